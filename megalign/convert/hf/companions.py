"""Reads the files of a Hugging Face checkpoint besides its weights, for an export to copy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.hf.reader import TOKENIZER_FILES
from megalign.convert.hf.weight_files import INDEX, SINGLE, StoredFiles
from megalign.files import write_whole
from megalign.schema import UserError


def companions(source: Path) -> list[Path]:
    """List a checkpoint's files besides weights and config.json: generation settings, tokenizer, chat templates."""
    paths = []
    for pattern in ("generation_config.json", *TOKENIZER_FILES):
        inside, _, name = pattern.rpartition("/")
        folder = source / inside
        # Not glob, which would silently skip a file that is listed but cannot be read.
        listed = sorted(os.listdir(folder)) if folder.is_dir() else []
        paths += [folder / entry for entry in listed if fnmatch(entry, name)]
    return paths


def read_companions(source: Path) -> dict[str, bytes]:
    """Return {path inside `source`: content} of the files that `companions` lists; UserError where reading fails."""
    try:
        return {str(path.relative_to(source)): path.read_bytes() for path in companions(source)}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def config_changes(source: HFModel) -> dict[str, Any]:
    """Return the config.json fields that an export changes (None: removes): quantisation, and omitted MTP layers."""
    changes: dict[str, Any] = {"quantization_config": None} if "quantization_config" in source.hf else {}
    unread = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if source.hf.get(key)]
    if unread and any((source.folder / name).is_file() for name in (SINGLE, INDEX)):
        extra = f"model.layers.{source.facts.num_layers}."
        if any(name.startswith(extra) for name in StoredFiles(source.folder).files):
            changes |= dict.fromkeys(unread, 0)
    return changes


def changed_config(source: HFModel, changes: Mapping[str, Any]) -> bytes:
    """Return the content of a config.json with `changes` applied; the file's own bytes if there are none."""
    if not changes:
        return (source.folder / "config.json").read_bytes()
    config = {**source.hf, **changes}
    kept = {key: value for key, value in config.items() if key not in changes or changes[key] is not None}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def copy_hf_files(source: Path, folder: Path) -> None:
    """Copy all files but the weights of a Hugging Face directory, config.json as `changed_config` returns it."""
    folder.mkdir(exist_ok=True)
    hf_model = read_model(source)
    write_whole(folder / "config.json", changed_config(hf_model, config_changes(hf_model)))
    for path in companions(source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
