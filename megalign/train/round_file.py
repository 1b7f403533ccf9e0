"""Keeps the round in progress in a checkpoint: a file of its own, which rank 0 writes once and all ranks read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalign.schema import reason_of
from megalign.train.checkpoint_facts import Damaged

ROUND = "round.json"
_BYTES = "__bytes__"


def round_text(state: dict[str, Any]) -> str:
    """Return a feed's state as the file's text, "" where it is empty; numbers keep every bit."""
    return json.dumps(state, default=_plain) if state else ""


def _plain(value: Any) -> Any:
    """Return a value that JSON lacks: the keys of scores, or in a record what training does not use, such as a date."""
    return {_BYTES: value.hex()} if isinstance(value, bytes) else str(value)


def read_round(folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the feed's state of a checkpoint; earlier versions have it in `extra`. Damaged where it cannot be read."""
    path = folder / ROUND
    if not path.exists():
        return dict(extra.get("feed", {}))
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), object_hook=_bytes)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    return state


def _bytes(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value[_BYTES]) if set(value) == {_BYTES} else value
