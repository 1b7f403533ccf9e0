"""Defines a save as engines prepare it: writing may then fail, or go on beside training, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalign.files import checksum

Listing = dict[str, list[int]]  # {path in the checkpoint: [bytes, CRC-32]}


@dataclass(frozen=True, slots=True)
class Written:
    """Lists the files that a rank has written, and holds what rank 0 needs to know of them."""

    files: Listing
    about: Any = None


@dataclass(frozen=True, slots=True)
class Saving:
    """Holds a save that an engine has prepared into a folder.

    num_bytes: at most what this rank will write. write: writes this rank's files, synced to disk, and raises UserError
    where that fails; of a save whose values were copied it does not communicate, and may run in a thread. finish:
    completes the folder on rank 0, from the `about` of what each rank wrote, with files that need not be synced;
    UserError where that fails.
    """

    num_bytes: int
    write: Callable[[], Written]
    finish: Callable[[Sequence[Any]], None]


def listing(folder: Path, names: Sequence[str]) -> Listing:
    """Read files of a folder and return their sizes and checksums."""
    return {name: [(folder / name).stat().st_size, checksum(folder / name)] for name in names}
