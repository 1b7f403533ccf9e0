"""Writes files and folders that appear under their final names only when complete and synced to disk.

No other module of the package renames, replaces or syncs a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import IO, Any

from megalign.schema import UserError

JOURNAL = ".progress.json"
BLOCK_BYTES = 1 << 24  # read, checked or written at once
UNCHECKED = 4  # blocks that may wait for their checksum, of memory that could be used again


class PartialFolder:
    """Collects the files of `folder` in a hidden directory `path` beside it, which `publish` renames to `folder`.

    key: identifies what is written. With a key, finished files are noted in a journal and survive an interruption; a
    later job with the same key finds them in `done`. Without one, nothing survives, and the remains of killed jobs are
    removed. Bad input or a disk error removes everything in both cases. replace: `folder` may exist (the caller has
    checked its content) and is replaced; without it, `folder` must be missing or empty. Raises UserError where the
    directory cannot be made, or another process is writing it.
    """

    def __init__(self, folder: Path, *, key: str | None = None, replace: bool = False) -> None:
        self.folder, self.key, self.replace = Path(folder).absolute(), key, replace
        self.done: dict[str, Any] = {}
        self.guard = threading.Lock()
        self.ended = False
        self.made = [folder for folder in self.folder.parents if not folder.exists()]  # to be made
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if key is None:
                self._sweep()
                self.path = Path(mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent))
                self.path.chmod(0o755)  # mkdtemp makes it readable for this user only
            else:
                self.path = self.folder.with_name(f".{self.folder.name}.partial")
                self.path.mkdir(exist_ok=True)
            self.lock = _locked(self.path)
            if key is not None:
                self._find_done()
        except BlockingIOError:
            raise UserError(f"{self.folder} is being written by another process; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None

    def _sweep(self) -> None:
        """Remove the partial directories of killed jobs: those whose lock nobody holds."""
        for path in self.folder.parent.glob(f".{glob.escape(self.folder.name)}.partial-*"):
            with contextlib.suppress(OSError):
                lock = _locked(path)
                if (path / "before").is_dir() and not self.folder.exists():
                    (path / "before").rename(self.folder)  # killed between the two renames in `publish`
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)

    def _find_done(self) -> None:
        """Read the journal of an interrupted job with the same key, and remove all files it does not list."""
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError
        ):  # no journal or a damaged one
            journal = json.loads((self.path / JOURNAL).read_text())
            if journal["key"] == self.key:
                self.done = {
                    file: note["says"]
                    for file, note in journal["done"].items()
                    if (self.path / file).is_file() and (self.path / file).stat().st_size == note["size"]
                }
        for path in self.path.iterdir():
            if path.name not in self.done and path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def need(self, num_bytes: int) -> None:
        """Raise UserError where the disk has less than `num_bytes` left."""
        need_room(self.path, num_bytes, what=self.folder)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, with the folders above it; UserError where that fails."""
        path = self.path / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)

    def finish(self, file: str, says: Any = None) -> None:
        """Note in the journal that a file is complete and synced; `says` is its value in a later job's `done`."""
        if self.key is None:
            return
        with self.guard:
            self.done[file] = says
            self._note()

    def _note(self) -> None:
        notes = {file: {"size": (self.path / file).stat().st_size, "says": says} for file, says in self.done.items()}
        self.write(JOURNAL, json.dumps({"key": self.key, "done": notes}).encode())

    def publish(self) -> None:
        """Rename the directory to `folder`; UserError where that is taken by now (finished files are then kept)."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        sync_folders(self.path)
        before = None
        try:
            if self.replace and self.folder.exists():
                before = Path(mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent)) / "before"
                self.folder.rename(before)
            self.path.rename(self.folder)  # works where `folder` is an empty directory
        except BaseException as error:
            if before is not None and before.exists() and not self.folder.exists():
                before.rename(self.folder)
            if not isinstance(error, OSError):
                raise
            if self.key is not None:
                self._note()
            self.abandon(keep=True)
            kept = "; move it and start again, what is written is kept" if self.key is not None else ""
            raise UserError(f"{self.folder} cannot be made: {error.strerror}{kept}") from None
        finally:
            if before is not None:
                shutil.rmtree(before.parent, ignore_errors=True)
        sync(self.folder.parent)
        self._end()

    def abandon(self, *, keep: bool = False) -> None:
        """Remove what was written, or with `keep` leave it to a later job; does nothing when called again."""
        if self.ended:
            return
        if not (keep and self.key is not None):
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process may have put files there
                for folder in self.made:
                    folder.rmdir()
        self._end()

    def _end(self) -> None:
        self.ended = True
        os.close(self.lock)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.abandon(keep=not isinstance(error, UserError | OSError))


def _locked(path: Path) -> int:
    """Lock a directory and return its handle; BlockingIOError where another process holds it or has just removed it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = os.stat(path, follow_symlinks=False) if path.exists() else None
        if named is None or not os.path.samestat(os.fstat(handle), named):
            raise BlockingIOError
    except OSError:
        os.close(handle)
        raise
    return handle


def write_whole(path: Path, content: bytes | str | Callable[[IO[bytes]], None], *, replace: bool = True) -> None:
    """Write a file atomically: it appears complete under its name or not at all; OSError where that fails.

    content: bytes, text (written as UTF-8), or a function that writes to the open file. replace: replace an existing
    file; if false, an existing file stays as it is.
    """
    # Several processes may write the same file at once, so each uses its own temporary name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _write_synced(temporary, content)
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _write_synced(path: Path, content: bytes | str | Callable[[IO[bytes]], None]) -> None:
    with open(path, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        sync(file.fileno())


def write_unsynced(path: Path, content: bytes | str) -> None:
    """Write a file into a folder that has no name yet, and whose files are synced together before it gets one."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_all(paths: Iterable[Path]) -> None:
    """Flush files and directories to disk at once, which costs little more than one of them."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, paths))


def _link(temporary: Path, path: Path) -> None:
    """Hard-link a file to `path` unless that exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(temporary.read_bytes())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a UserError that names the file that it is about, else `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def need_room(folder: Path, num_bytes: int, *, what: Path) -> None:
    """Raise UserError where a folder's disk has less than `num_bytes` left, which `what` takes."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        sizes = f"it takes {num_bytes / 1e6:,.2f} MB, {free / 1e6:,.2f} MB are free there"
        raise UserError(f"{what} cannot be written: {sizes}")


def write_at(handle: int, content: memoryview | bytes, offset: int) -> None:
    """Write all of `content` into an open file, from byte `offset` on."""
    view = memoryview(content)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


class CheckedFile:
    """Writes a new file from beginning to end; `size` is that of what is written so far, `crc` known once it is closed.

    The checksum (CRC-32) is computed in a thread beside writing and syncing. Errors are UserErrors that name the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.crc = path, 0, 0
        with writing(path):
            self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.beside = ThreadPoolExecutor(1)
        self.behind: deque[Future[None]] = deque()  # blocks that are still to be checked

    def write(self, content: memoryview | bytes, *, lasting: bool = False) -> None:
        """Append bytes; lasting: they stay in memory anyway until the file is closed, so that many may be unchecked."""
        view = memoryview(content).cast("B")
        for first in range(0, len(view), BLOCK_BYTES):
            block = view[first : first + BLOCK_BYTES]
            with writing(self.path):
                write_at(self.handle, block, self.size)
            self.size += len(block)
            self.behind.append(self.beside.submit(self._check, block))
            while not (lasting or isinstance(content, bytes)) and len(self.behind) > UNCHECKED:
                self.behind.popleft().result()

    def _check(self, block: memoryview) -> None:
        self.crc = zlib.crc32(block, self.crc)

    def close(self) -> None:
        """Sync the file to disk and close it."""
        try:
            with writing(self.path):
                sync(self.handle)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file without syncing it; does nothing when called again."""
        self.behind.clear()
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1
        self.beside.shutdown()


def checksum(path: Path) -> int:
    """Read a file and return its CRC-32, as `CheckedFile` computes it."""
    crc, block = 0, memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return crc


def move(path: Path, target: Path) -> Path:
    """Rename a file or folder within its file system, sync the rename to disk, and return the new path."""
    path.rename(target)
    sync(target.parent)
    return target


def sync(file: Path | int) -> None:
    """Flush a file, a directory (its list of names) or an open file to disk (fsync)."""
    if isinstance(file, int):
        os.fsync(file)
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folders(folder: Path) -> None:
    """Flush a folder and all folders below it (their lists of names) to disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    sync(folder)
