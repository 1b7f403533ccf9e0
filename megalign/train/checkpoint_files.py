"""Lists the files of a checkpoint when it is written, and refuses one that is not whole or is of another model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.megatron.checkpoint_dir import FACTS, HF_FILES, MARK
from megalign.schema import UserError, reason_of

FILES = "files.json"  # the name and size of every other file, so that an incomplete copy is noticed


def check_whole(folder: Path, model: HFModel) -> None:
    """Refuse a checkpoint whose files are missing or of another size, or whose model is not that of `model.path`."""
    for name in (FACTS if (folder / FACTS).is_file() else MARK, f"{HF_FILES}/config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; must be a checkpoint that megalign wrote")
    held = read_model(folder / HF_FILES)
    theirs, ours = (held.config, model.config) if held.config and model.config else (held.facts, model.facts)
    for field in fields(ours):
        was, now = getattr(theirs, field.name), getattr(ours, field.name)
        if was != now:
            raise UserError(
                f"{folder}: its model has {field.name} {was}; must be that of model.path, {now}; to begin anew, "
                "another run.dir or checkpoint.resume=never"
            )
    listing = folder / FILES
    if not listing.is_file():  # a converted one
        return
    present = file_sizes(folder)
    try:
        written = dict(json.loads(listing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{listing} cannot be read ({reason_of(error)}); must be as megalign wrote it") from None
    for name, size in written.items():
        if present.get(name) != size:
            now = f"{present[name]} bytes long" if name in present else "missing"
            raise UserError(f"{folder}: {name} is {now}; must have the {size} bytes that were written")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder`, FILES excepted."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
