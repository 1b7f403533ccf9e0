"""Keeps scores in a folder while they are made, so that a run that stops, or starts again, makes none of them twice.

A file holds whole batches: what was scored together comes back together, and what is left is packed as it would have
been. Each file names what its scores depend on besides the sequences; a file of anything else is not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megalign.data.group import TokenSequence
from megalign.engines.scoring import Scored
from megalign.files import write_whole
from megalign.runtime.ranks import gather
from megalign.schema import UserError, reason_of
from megalign.scores.store import Key, ScoreStore, key_of

FORMAT = "1"
SECONDS_BETWEEN_FILES = 30.0


class KeptScores:
    """Keeps the scores under one set of weights in files `folder`/<name>-<number>.safetensors.

    about: what the scores depend on besides the sequences, plain values. writes: only one process of a job does. As a
    context manager, it writes what waits when the block is left, by a signal too.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        about: Mapping[str, Any],
        *,
        by_token: bool,
        writes: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.title, self.by_token, self.writes, self.say = folder, name, by_token, writes, say
        self.name = re.sub(r"\W+", "_", name)
        text = json.dumps({"format": FORMAT, "name": name, "by_token": by_token, **about}, sort_keys=True)
        self.about = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._waiting: list[tuple[Key, Scored]] = []
        self._written = time.monotonic()
        self._number = 0

    def __enter__(self) -> KeptScores:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()

    def load(self, store: ScoreStore) -> None:
        """Add what is kept to a store, if every rank reads the same; called on all ranks.

        Files that cannot be read count as absent.
        """
        found: dict[Key, Scored] = {}
        for path in sorted(self.folder.glob(f"{self.name}-*.safetensors")):
            self._number = max(self._number, int(path.stem.rpartition("-")[2]) + 1)
            try:
                found |= self._read(path)
            except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
                continue
        digest = hashlib.blake2b(b"".join(found), digest_size=16).hexdigest()
        if len(set(gather(digest))) > 1:
            self.say(f"{self.title}: the ranks do not read the same scores in {self.folder}; all are made anew")
        elif found:
            self.say(f"{self.title}: {len(found)} sequences have their scores in {self.folder}")
            for key, entry in found.items():
                store.put(key, entry)

    def _read(self, path: Path) -> dict[Key, Scored]:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("about") != self.about:
                return {}
            keys, totals, sizes = (file.get_tensor(name) for name in ("keys", "totals", "sizes"))
            tokens: list[Tensor | None] = [None] * len(keys)
            if self.by_token:
                tokens = [each.clone() for each in file.get_tensor("tokens").split(sizes.tolist())]
        return {
            key.numpy().tobytes(): Scored(total, logp_N)
            for key, total, logp_N in zip(keys, totals.tolist(), tokens, strict=True)
        }

    def add(self, sequences: Sequence[TokenSequence], scored: Sequence[Scored]) -> None:
        """Keep a batch's scores; they are written every half minute, or when `write` is called."""
        if not self.writes:
            return
        self._waiting += [(key_of(sequence), entry) for sequence, entry in zip(sequences, scored, strict=True)]
        if time.monotonic() - self._written > SECONDS_BETWEEN_FILES:
            self.write()

    def write(self) -> None:
        """Write the scores that wait; a file is there whole or not at all. Where that fails, no more are kept."""
        if not self._waiting:
            return
        keys = torch.frombuffer(bytearray(b"".join(key for key, _ in self._waiting)), dtype=torch.uint8).view(-1, 16)
        entries = [entry for _, entry in self._waiting]
        tokens = [torch.zeros(0) if entry.logp_N is None else entry.logp_N for entry in entries]
        tensors = {
            "keys": keys.clone(),
            "totals": torch.tensor([entry.total for entry in entries], dtype=torch.float64),
            "sizes": torch.tensor([len(each) for each in tokens]),
        }
        if self.by_token:
            tensors["tokens"] = torch.cat(tokens)
        try:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"{self.name}-{self._number:06d}.safetensors"
            write_whole(path, save(tensors, {"about": self.about}))
        except (OSError, UserError) as error:
            self.writes = False
            self.say(f"{self.title}: scores are not kept in {self.folder}: {reason_of(error)}")
        self._waiting, self._number, self._written = [], self._number + 1, time.monotonic()
