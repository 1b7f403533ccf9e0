"""Git LFS pointers: what a clone that was made without git-lfs holds in the place of large files."""

from __future__ import annotations

import re
from pathlib import Path

from megalign.schema import UserError

MARK = b"version https://git-lfs"
LONGEST = 1024  # bytes of a pointer, by its specification


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is a pointer; one that cannot be read is left to whoever opens it."""
    try:
        with open(path, "rb") as file:
            head = file.read(LONGEST)
    except OSError:
        return
    if not head.startswith(MARK):
        return
    size = re.search(rb"^size (\d+)$", head, re.MULTILINE)
    of = f" of {int(size[1])} bytes" if size is not None else ""
    raise UserError(f"{path} is a Git LFS pointer, not the file{of}; fetch it with `git lfs pull` in {path.parent}")
