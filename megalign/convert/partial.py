"""A directory that is visible under its name only once it is whole, and that an interrupted job can go on with."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import threading
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

from megalign.schema import UserError

JOURNAL = ".progress.json"


class PartialFolder:
    """Everything is written to `path`, a hidden directory beside `folder`, which takes its name in `publish`.

    key: says what is being written. Finished files are then noted in a journal, and stay when the job is interrupted;
    a later job of the same key finds them in `done`. Without a key nothing stays, and what killed jobs left is removed.
    Bad input or a disk's error leaves nothing either way. replace: it may take the place of what `folder` holds, which
    the caller has checked; else that must be nothing. Raises UserError where the directory cannot be made, or another
    job is writing it.
    """

    def __init__(self, folder: Path, *, key: str | None = None, replace: bool = False) -> None:
        self.folder, self.key, self.replace = Path(folder).absolute(), key, replace
        self.done: dict[str, Any] = {}
        self.guard = threading.Lock()
        self.ended = False
        above = self.folder.parents
        self.made = [one for one in above if not one.exists()]  # the nearest first
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if key is None:
                self._sweep()
                self.path = Path(mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent))
                self.path.chmod(0o755)  # not only for this user, as temporary directories are
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
        """Remove what jobs left that were killed: nobody holds its lock."""
        for path in self.folder.parent.glob(f".{glob.escape(self.folder.name)}.partial-*"):
            with contextlib.suppress(OSError):
                lock = _locked(path)
                if (path / "before").is_dir() and not self.folder.exists():
                    (path / "before").rename(self.folder)  # killed between the two renames of `publish`
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)

    def _find_done(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
            found = json.loads((self.path / JOURNAL).read_text())
            if found["key"] == self.key:
                self.done = {
                    file: note["says"]
                    for file, note in found["done"].items()
                    if (self.path / file).is_file() and (self.path / file).stat().st_size == note["size"]
                }
        for path in self.path.iterdir():
            if path.name not in self.done and path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def need(self, num_bytes: int) -> None:
        """UserError where the disk has less than `num_bytes` left."""
        free = shutil.disk_usage(self.path).free
        if num_bytes > free:
            sizes = f"it takes {num_bytes / 1e6:,.2f} MB, {free / 1e6:,.2f} MB are free there"
            raise UserError(f"{self.folder} cannot be written: {sizes}")

    def finish(self, file: str, says: Any = None) -> None:
        """Note a file that is whole and on the disk, with what to know of it."""
        if self.key is None:
            return
        with self.guard:
            self.done[file] = says
            self._note()

    def _note(self) -> None:
        notes = {one: {"size": (self.path / one).stat().st_size, "says": told} for one, told in self.done.items()}
        new = self.path / f"{JOURNAL}.new"
        write_synced(new, json.dumps({"key": self.key, "done": notes}).encode())
        new.rename(self.path / JOURNAL)

    def publish(self) -> None:
        """Give the directory its name; UserError where something else has it by now (finished files then stay)."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        for folder in (*(path for path in self.path.rglob("*") if path.is_dir()), self.path):
            sync(folder)
        before = None
        try:
            if self.replace and self.folder.exists():
                before = Path(mkdtemp(prefix=f".{self.folder.name}.partial-", dir=self.folder.parent)) / "before"
                self.folder.rename(before)
            self.path.rename(self.folder)  # an empty directory may have the name
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
        """Remove what was written, or with `keep` leave it to a later job; nothing where that is done already."""
        if self.ended:
            return
        if not (keep and self.key is not None):
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may have put something there
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
    """A handle that keeps others out of a directory; BlockingIOError where one has it, or has just removed it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.stat(path, follow_symlinks=False) if path.exists() else None
        if found is None or not os.path.samestat(os.fstat(handle), found):
            raise BlockingIOError
    except OSError:
        os.close(handle)
        raise
    return handle


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and bring it to the disk; UserError where that fails."""
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        sync(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_at(handle: int, content: memoryview | bytes, place: int) -> None:
    """All of `content` into an open file, from byte `place` on."""
    view = memoryview(content)
    while view:
        count = os.pwrite(handle, view, place)
        view, place = view[count:], place + count


def sync(path: Path) -> None:
    """What is renamed into place must be on the disk before its name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
