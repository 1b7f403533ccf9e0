"""Recognise Git LFS pointers, which replace large files in a clone made without git-lfs."""

from __future__ import annotations

import re
from pathlib import Path

from megalign.schema import UserError

POINTER_START = b"version https://git-lfs"
LONGEST = 1024  # most bytes of a pointer, by its specification


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` if a file is a Git LFS pointer; ignore a file that cannot be read, which its reader reports."""
    try:
        with open(path, "rb") as file:
            head = file.read(LONGEST)
    except OSError:
        return
    if not head.startswith(POINTER_START):
        return
    size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    of = f" of {int(size[1])} bytes" if size is not None else ""
    raise UserError(f"{path} is a Git LFS pointer, not the file{of}; fetch it with `git lfs pull` in {path.parent}")
