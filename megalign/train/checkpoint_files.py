"""Lists the files of a checkpoint with sizes and checksums, and tells what is damaged in one, or of another model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.megatron.checkpoint_dir import FACTS, HF_FILES, MARK, is_checkpoint
from megalign.convert.megatron.torch_dist import COMMON, INDEX
from megalign.files import checksum
from megalign.schema import UserError, reason_of
from megalign.train.checkpoint_facts import Damaged, read_plain

FILES = "files.json"  # every other file's size and CRC-32, so that an incomplete or spoiled copy is noticed
NAME = re.compile(r"step_(\d{8})")
SMALL = 1 << 20  # bytes; files up to this size are checked as soon as a checkpoint is looked at


class Recorded(NamedTuple):
    """Holds what FILES says of a file; `crc` is None in checkpoints of earlier versions."""

    size: int
    crc: int | None = None


def step_of(folder: Path) -> int | None:
    """Return the step that a checkpoint's name tells, also while a new one of the same step replaces it; else None."""
    match = NAME.fullmatch(shown_name(folder))
    return int(match[1]) if match else None


def shown_name(folder: Path) -> str:
    """Return the name of a checkpoint, also while a new one of the same step replaces it."""
    return folder.name.removeprefix(".").removesuffix(".replaced")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder`, FILES excepted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def read_listing(folder: Path) -> dict[str, Recorded]:
    """Read FILES; nothing for a checkpoint of a conversion or an earlier version, Damaged where it should be there."""
    path = folder / FILES
    if not path.is_file():
        if (folder / FACTS).is_file():
            raise Damaged(f"{folder}: {FILES} is missing; must be a checkpoint as megalign wrote it")
        return {}
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        listing = {name: _recorded(value) for name, value in dict(plain).items()}
        if FACTS not in listing and (folder / FACTS).is_file():  # an empty one would let everything pass
            raise TypeError(f"it does not list {FACTS}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    return listing


def _recorded(value: Any) -> Recorded:
    """Turn a size, [size, CRC-32] or {"size", "crc32"} into a Recorded."""
    if isinstance(value, Mapping):
        value = [value["size"], value["crc32"]]
    parts = [value] if isinstance(value, int) else value
    if not (isinstance(parts, list) and 1 <= len(parts) <= 2 and all(isinstance(part, int) for part in parts)):
        raise TypeError(f"{value!r} is no size")
    return Recorded(*parts)


def check_undamaged(folder: Path) -> None:
    """Raise Damaged where files are missing, of another size, or small and of other content than was written."""
    try:
        _check_undamaged(folder)
    except OSError as error:  # not allowed, or a file system that has lost part of it
        raise Damaged(f"{folder} cannot be read ({reason_of(error)})") from None


def _check_undamaged(folder: Path) -> None:
    if not is_checkpoint(folder):
        raise Damaged(f"{folder}: {FACTS} is missing; must be a checkpoint that megalign wrote")
    if not (folder / HF_FILES / "config.json").is_file():
        raise Damaged(f"{folder}: {HF_FILES}/config.json is missing; must be a checkpoint that megalign wrote")
    listing = read_listing(folder)
    present = file_sizes(folder)
    for name in (INDEX, COMMON) if MARK in present and not listing else ():
        if name not in present:  # a converted one may be half a copy too
            raise Damaged(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    for name, recorded in listing.items():
        if present.get(name) != recorded.size:
            now = f"{present[name]} bytes long" if name in present else "missing"
            raise Damaged(f"{folder}: {name} is {now}; must have the {recorded.size} bytes that were written")
    if not listing and not any((folder / name).is_file() for name in (FACTS, MARK)):
        raise Damaged(f"{folder}: {MARK} is missing; must be a checkpoint that megalign wrote")
    check_contents(folder, listing, (name for name, recorded in listing.items() if recorded.size <= SMALL))
    step, named = (read_plain(folder) or {}).get("step"), step_of(folder)
    if step is not None and named is not None and named != step:  # else it would stand for a step that it does not hold
        raise Damaged(f"{folder}: {FACTS} is of step {step}; must be of step {named}, as the name says")


def check_contents(folder: Path, listing: Mapping[str, Recorded], names: Iterable[str]) -> None:
    """Raise Damaged for the first of these files whose content is not what was written."""
    for name in names:
        crc = listing[name].crc
        if crc is None:
            continue
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise Damaged(f"{folder}: {name} cannot be read ({error.strerror})") from None
        if found != crc:
            raise Damaged(f"{folder}: {name} has checksum {found:08x}; must be {crc:08x}, that of what was written")


def check_share(folder: Path, *, rank: int, num_ranks: int) -> None:
    """Check the contents of this rank's share of the large files; over all ranks each is read once.

    Raises Damaged as `check_contents` does.
    """
    listing = read_listing(folder)
    large = [name for name, recorded in listing.items() if recorded.size > SMALL]
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    taken = [0] * num_ranks
    for name in sorted(large, key=lambda name: (-listing[name].size, name)):
        least = taken.index(min(taken))
        shares[least].append(name)
        taken[least] += listing[name].size
    check_contents(folder, listing, shares[rank])


def extra_files(folder: Path) -> list[str]:
    """Return the files that no save wrote; nothing for a checkpoint without FILES."""
    listing = read_listing(folder)
    return [name for name in file_sizes(folder) if name not in listing] if listing else []


def check_whole(folder: Path, model: HFModel) -> None:
    """Refuse a checkpoint that `check_undamaged` refuses, or whose model is not that of `model.path`."""
    check_undamaged(folder)
    held = read_model(folder / HF_FILES)
    theirs, ours = (held.config, model.config) if held.config and model.config else (held.facts, model.facts)
    for field in fields(ours):
        was, now = getattr(theirs, field.name), getattr(ours, field.name)
        if was != now:
            raise UserError(
                f"{folder}: its model has {field.name} {was}; must be that of model.path, {now}; to begin anew, "
                "another run.dir or checkpoint.resume=never"
            )
