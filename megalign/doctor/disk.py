"""Measures one directory from one process: what file system it is, what works there, and how fast it writes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from megalign.files import move, sync, write_whole

PREFIX = ".megalign-doctor-probe-"  # of directories that a doctor makes, and removes when it is done
FORGOTTEN_S = 900.0  # since when the probe of a doctor that was killed is removed by the next
FIRST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
WRITE_S = 0.7  # after which no larger file is written


def file_system(path: Path) -> tuple[str, str]:
    """Return (type, device) of the file system that holds an existing path."""
    resolved, best, found = os.path.realpath(path), "", ("unknown", "")
    with suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            device, point, kind = (_unescaped(word) for word in line.split()[:3])
            inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # the last of equal ones lies on top
                best, found = point, (kind, device)
    return found


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def space(path: Path) -> tuple[int, int | None]:
    """Return (bytes, files) that this user may still write there; None where files are not counted."""
    numbers = os.statvfs(path)
    return numbers.f_bavail * numbers.f_frsize, numbers.f_favail if numbers.f_files else None


def sweep(folder: Path, newest: Path) -> None:
    """Remove the probes that killed doctors left in a directory; `newest` is this doctor's own."""
    now = newest.stat().st_mtime  # of the file system's own clock
    for old in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if old != newest and now - old.stat().st_mtime > FORGOTTEN_S:
                shutil.rmtree(old, ignore_errors=True)


def lacking(folder: Path) -> dict[str, str]:
    """Try what saving relies on in a directory; return {what: reason} of what does not work."""
    problems: dict[str, str] = {}
    for what, attempt in (("rename", _rename), ("hard links", _link), ("sync", sync)):
        try:
            attempt(folder)
        except OSError as error:
            problems[what] = error.strerror or str(error)
    return problems


def _rename(folder: Path) -> None:
    """Rename a file over another and a directory to a new name; OSError where either fails or has no effect."""
    for content in ("old", "new"):
        write_whole(folder / "renamed", content)
    (folder / "partial").mkdir()
    move(folder / "partial", folder / "whole")
    if (folder / "renamed").read_text() != "new" or not (folder / "whole").is_dir():
        raise OSError(errno.EIO, "a renamed file does not have its new name")


def _link(folder: Path) -> None:
    (folder / "first").touch()
    os.link(folder / "first", folder / "second")


def reserve(path: Path, num_bytes: int) -> str:
    """Reserve space in a file and give it back at once; return why it cannot be had, such as a quota.

    Empty also where the file system cannot reserve: nothing is written in place of it.
    """
    libc, handle = ctypes.CDLL(None, use_errno=True), os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        failed = libc.fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes))
        number = ctypes.get_errno() if failed else 0
        return os.strerror(number) if number in (errno.EDQUOT, errno.ENOSPC, errno.EFBIG) else ""
    finally:
        os.close(handle)
        path.unlink()


def hold_lock(folder: Path) -> tuple[int, str]:
    """Lock a directory as `files.PartialFolder` does; return (handle, why that failed or empty)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, "held"
    except OSError as error:
        return handle, error.strerror or str(error)
    return handle, ""


def write_speed(path: Path) -> float:
    """Return the bytes a second at which a file is written and synced, of the largest that takes about a second.

    The file's bytes cannot be compressed. Each of the files, four times as large as the one before, is removed.
    """
    block, size, began, speed = os.urandom(FIRST_BYTES), FIRST_BYTES, time.perf_counter(), 0.0
    try:
        while size <= MOST_BYTES and time.perf_counter() - began < WRITE_S:
            speed = size / _seconds_to_write(path, block, size // len(block))
            path.unlink()
            size *= 4
    finally:
        path.unlink(missing_ok=True)
    return speed


def _seconds_to_write(path: Path, block: bytes, count: int) -> float:
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
        sync(file.fileno())
    return time.perf_counter() - start


def awaited(path: Path, content: str, until: float) -> str:
    """Wait until a file has the content, at most until a time of time.monotonic(); return why not, empty where it has.

    Attributes that a network file system caches may be older than the file.
    """
    while True:
        try:
            found = path.read_text()
            problem = "" if found == content else "another file is there"
        except OSError as error:
            problem = error.strerror or str(error)
        if not problem or time.monotonic() > until:
            return problem
        time.sleep(0.2)
