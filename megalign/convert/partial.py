"""A directory that is visible under its name only once it is whole, and that an interrupted job can go on with."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from megalign.schema import UserError

JOURNAL = ".progress.json"


class PartialFolder:
    """Everything is written to `path`, a hidden directory beside `folder`, which takes its name in `publish`.

    key: says what is being written. Finished files are then noted in a journal, and stay when the job is interrupted;
    a later job of the same key finds them in `done`. Without a key nothing stays. An error of the user's leaves nothing
    either way. Raises UserError where the directory cannot be made, or another job is writing it.
    """

    def __init__(self, folder: Path, *, key: str | None = None) -> None:
        self.folder, self.key = Path(folder).absolute(), key
        self.path = self.folder.with_name(f".{self.folder.name}.partial" + ("" if key else f"-{os.getpid()}"))
        self.done: dict[str, Any] = {}
        self.guard = threading.Lock()
        try:
            self.path.mkdir(parents=True, exist_ok=key is not None)
            self.lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is being written by another process; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None
        if key is not None:
            self._find_done()

    def _find_done(self) -> None:
        journal = self.path / JOURNAL
        try:
            found = json.loads(journal.read_text())
        except (OSError, ValueError):
            found = {}
        if found.get("key") == self.key:
            self.done = {
                file: note["says"]
                for file, note in found["done"].items()
                if (self.path / file).is_file() and (self.path / file).stat().st_size == note["size"]
            }
        for path in self.path.iterdir():
            if path.name not in self.done and path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

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
        """Give the directory its name, in the place of what is there; the caller has checked that it may go."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        for folder in (*(path for path in self.path.rglob("*") if path.is_dir()), self.path):
            sync(folder)
        replaced = self.folder.with_name(f".{self.folder.name}.replaced-{os.getpid()}")
        replaces = self.folder.exists()
        if replaces:
            self.folder.rename(replaced)
        try:
            self.path.rename(self.folder)
        except OSError:
            if replaces:
                replaced.rename(self.folder)
            raise
        sync(self.folder.parent)
        os.close(self.lock)
        if replaces:
            shutil.rmtree(replaced)

    def abandon(self, *, keep: bool = False) -> None:
        """Remove what was written, or with `keep` leave it to a later job."""
        os.close(self.lock)
        if not (keep and self.key is not None):
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.abandon(keep=not isinstance(error, UserError))


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
