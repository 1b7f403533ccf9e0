"""File systems that only one process sees, or that are small, for tests that root runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def missing() -> str:
    """Why nothing can be mounted here; empty where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    return tried.stderr.strip()


def alone_with(*mounts: Sequence[str | Path]) -> list[str]:
    """The words before a command that sees these mounts (words after `mount`), which nobody else sees."""
    script = "".join(f"mount {' '.join(map(str, words))} && " for words in mounts)
    return ["unshare", "-m", "sh", "-c", f'{script}exec "$@"', "sh"]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with options such as `size=64k` inside the block."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
