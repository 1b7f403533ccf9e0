"""Writing a Hugging Face checkpoint tensor by tensor, visible under its name only once it is whole."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megalign.convert.config_file import read_json
from megalign.convert.hf_config import read_model_config
from megalign.convert.model_config import ModelConfig
from megalign.convert.partial import PartialFolder, sync, write_synced
from megalign.convert.reader import TOKENIZER_FILES, audit, needed_shapes
from megalign.convert.rules import FAMILIES
from megalign.convert.safetensors_file import SafetensorsFile, Spec, plan_shards
from megalign.convert.stored import INDEX, SINGLE, StoredFiles
from megalign.schema import UserError

DEFAULT_SHARD_BYTES = 5_000_000_000
ADAPTER, ADAPTER_FILES = "adapter", ("adapter_model.safetensors", "adapter_config.json")
MARK = ".megalign_export"  # only a directory that bears this file is ever replaced; it says which run made it


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that an export is of; its later exports replace its earlier ones, and no other run's.

    run: its directory. job: digest of what it trains. resumed: it goes on from a checkpoint of its own directory.
    """

    run: str
    job: str
    resumed: bool = False

    def mark(self) -> bytes:
        """Say in an export whose it is."""
        return (json.dumps({"run": self.run, "job": self.job}) + "\n").encode()

    def made(self, folder: Path) -> bool:
        """Whether an export is this run's: two of directory, job and a checkpoint to go on from say so.

        So a run may be moved, or go on with a changed setting that it was allowed.
        """
        by = made_by(folder)
        if not by:  # of a version that did not say
            return self.resumed
        return (by.get("run") == self.run) + (by.get("job") == self.job) + self.resumed >= 2


def made_by(folder: Path) -> dict[str, Any]:
    """What an export says of the run that made it; nothing where it does not say."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class HFWriter:
    """Streams tensors, in any order, into the checkpoint `folder`, with the configuration and tokenizer of `source`.

    Everything goes to a hidden directory beside `folder`, which takes its name in `close`, after the result passed the
    audit that reading makes; an exception inside `with` leaves nothing, unless `key` says that a later writer of the
    same key may go on with the finished files. No tensor is held once it is written. Safe for several threads.
    An existing `folder` must be empty or, with `overwrite`, an earlier export other than `source`, and of `owner` where
    one is given.
    `specs` says what tensors come; without it they are those of the model in `source`, in `dtype` or, where that is
    None, in that of the first that comes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: Path,
        dtype: torch.dtype | None = None,
        specs: Mapping[str, Spec] | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        owner: Owner | None = None,
        key: str | None = None,
    ) -> None:
        self.folder, self.source = Path(folder).absolute(), Path(source)
        check_target(self.folder, self.source, overwrite=overwrite, owner=owner)
        self.model = read_model_config(self.source)
        self.max_shard_bytes, self.overwrite, self.owner = max_shard_bytes, overwrite, owner
        self.specs: dict[str, Spec] = {}
        self.file_of: dict[str, str] = {}
        self.open: dict[str, SafetensorsFile] = {}
        self.finished: set[str] = set()
        self.lock = threading.Lock()
        self.beside = read_companions(self.source)
        self.partial = PartialFolder(self.folder, key=key, replace=overwrite)
        if specs is not None or dtype is not None:
            try:
                self._plan(specs if specs is not None else model_specs(self.model, dtype or torch.float32))
            except UserError:
                self.abandon()
                raise

    def _plan(self, specs: Mapping[str, Spec]) -> None:
        """Which file each tensor goes to."""
        self.specs = dict(specs)
        shards = plan_shards(self.specs, self.max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self.file_of.update(dict.fromkeys(shard, file))
        self.partial.need(sum(self.specs[name].num_bytes for name in self.missing))

    @property
    def missing(self) -> list[str]:
        """Tensors of files that an earlier writer has not finished."""
        return [name for name, file in self.file_of.items() if file not in self.partial.done]

    def _opened(self, file: str) -> SafetensorsFile:
        with self.lock:
            if file not in self.open:
                specs = {one: spec for one, spec in self.specs.items() if self.file_of[one] == file}
                self.open[file] = SafetensorsFile(self.partial.path / file, specs)
            return self.open[file]

    def share(self) -> SharedFiles:
        """Make every file, for `HFPart`s in other processes to write; `received` must then have what each wrote."""
        for file in dict.fromkeys(self.file_of.values()):
            self._opened(file)
        return SharedFiles(self.partial.path, {file: shard.specs for file, shard in self.open.items()})

    def received(self, written: Mapping[str, Iterable[tuple[str, int | None]]]) -> None:
        """Note what another process wrote: by file, (tensor, row or None)."""
        for file, names in written.items():
            for name, row in names:
                self.open[file].mark(name, row)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, in the dtype that was announced."""
        if not self.specs:
            self._plan(model_specs(self.model, tensor.dtype))
        if name not in self.specs:
            raise ValueError(f"{name} is no tensor of this checkpoint")
        file = self.file_of[name]
        shard = self._opened(file)
        shard.write(name, converted(name, tensor, self.specs[name].dtype))
        with self.lock:
            finished = file not in self.finished and not shard.missing
            self.finished |= {file} if finished else set()
        if finished:  # outside the lock: it waits for the disk
            shard.close()
            self.partial.finish(file)

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Put a LoRA adapter into the folder `adapter`, from which `peft` loads it onto `source`."""
        folder = self.partial.path / ADAPTER
        folder.mkdir(exist_ok=True)
        weights, settings = (folder / name for name in ADAPTER_FILES)
        try:
            found = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(found, weights, metadata={"format": "pt"})
            sync(weights)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights} cannot be written: {error}") from None
        write_synced(settings, (json.dumps(config, indent=2) + "\n").encode())
        sync(folder)

    def close(self) -> None:
        """Finish, check and publish the checkpoint."""
        try:
            left = self._left()
            if left or not self.specs:
                raise RuntimeError(f"the export to {self.folder} is not a whole checkpoint: {left[:1]} is missing")
            for shard in self.open.values():
                if not shard.closed:  # others have written it
                    shard.close()
            self._write_index()
            write_synced(self.partial.path / MARK, b"" if self.owner is None else self.owner.mark())
            for name, content in self.beside.items():
                write_synced(self.partial.path / name, content)
            self._write_config()
            try:
                audit(self.partial.path, read_model_config(self.partial.path))
            except UserError as error:
                raise RuntimeError(f"the export to {self.folder} is not a whole checkpoint: {error}") from error
            # Again, for something may have come up since.
            check_target(self.folder, self.source, overwrite=self.overwrite, owner=self.owner)
        except BaseException as error:
            self.abandon(keep=not isinstance(error, UserError | RuntimeError | ValueError | OSError))
            raise
        self.partial.publish()

    def _left(self) -> list[str]:
        """Tensors that never came."""
        unfinished = [name for name in self.missing if self.file_of[name] not in self.open]
        return unfinished + [name for shard in self.open.values() for name in shard.missing]

    def abandon(self, *, keep: bool = False) -> None:
        """Remove what was written, or with `keep` leave finished files to a later writer; the target is untouched."""
        for shard in self.open.values():
            if not shard.closed:
                shard.abandon()
        self.partial.abandon(keep=keep)

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon(keep=not isinstance(error, UserError | OSError))

    def _write_index(self) -> None:
        if len(set(self.file_of.values())) > 1:
            metadata = {
                "total_parameters": sum(math.prod(spec.shape) for spec in self.specs.values()),
                "total_size": sum(spec.num_bytes for spec in self.specs.values()),
            }
            index = {"metadata": metadata, "weight_map": dict(sorted(self.file_of.items()))}
            write_synced(self.partial.path / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _write_config(self) -> None:
        """The source's bytes, unless what is written differs from what they say."""
        path = self.source / "config.json"
        config, changes = read_json(path), config_changes(self.source, self.model)
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        fixed = fixed_dtypes(self.model)
        dtypes = {spec.dtype for name, spec in self.specs.items() if name not in fixed}
        if len(dtypes) == 1:
            written = str(next(iter(dtypes))).removeprefix("torch.")
            changes |= {key: written for key in keys if config.get(key) != written}
        write_synced(self.partial.path / "config.json", changed(path, changes))


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """Where several processes write one checkpoint: what `HFWriter.share` gives, to be sent to them."""

    folder: Path
    specs: Mapping[str, Mapping[str, Spec]]  # by file


class HFPart:
    """One process's part of a checkpoint that several write, on a file system that all of them see."""

    def __init__(self, shared: SharedFiles) -> None:
        self.shared = shared
        self.file_of = {name: file for file, specs in shared.specs.items() for name in specs}
        self.open: dict[str, SafetensorsFile] = {}

    def add(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Write a tensor or one row of it; UserError where the file is not to be seen or cannot be written."""
        file = self.file_of[name]
        specs = self.shared.specs[file]
        if file not in self.open:
            self.open[file] = SafetensorsFile(self.shared.folder / file, specs, create=False)
        self.open[file].write(name, converted(name, tensor, specs[name].dtype), row)

    def close(self) -> dict[str, list[tuple[str, int | None]]]:
        """Bring all to the disk; by file, what was written."""
        for shard in self.open.values():
            shard.close(partly=True)
        return {file: list(shard.written) for file, shard in self.open.items()}

    def abandon(self) -> None:
        """Let go of the files."""
        for shard in self.open.values():
            if not shard.closed:
                shard.abandon()


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; UserError where that has no place for its values."""
    if tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if torch.isinf(found).sum() > torch.isinf(tensor).sum():
        largest = float(tensor[torch.isfinite(tensor)].abs().max())
        raise UserError(f"tensor {name} holds {largest:g}, more than {dtype} can; needed: a wider dtype")
    return found


def model_specs(model: ModelConfig, dtype: torch.dtype) -> dict[str, Spec]:
    """The tensors of a model's checkpoint in one dtype, but those that have one of their own."""
    fixed = fixed_dtypes(model)
    return {name: Spec(shape, fixed.get(name, dtype)) for name, shape in needed_shapes(model).items()}


def fixed_dtypes(model: ModelConfig) -> dict[str, torch.dtype]:
    """Of tensors that do not follow the model's."""
    experts = range(0 if model.moe is None else model.moe.num_experts)
    return {
        piece.name.format(**place): rule.dtype
        for rule in FAMILIES[model.family].rules
        if rule.dtype is not None
        for place in rule.places(model, range(model.num_layers), experts)
        for piece in rule.pieces
    }


def config_changes(source: Path, model: ModelConfig) -> dict[str, Any]:
    """What config.json must no longer say of an export (None: the field goes): scales, and layers that are not read."""
    config = read_json(source / "config.json")
    changes: dict[str, Any] = {"quantization_config": None} if "quantization_config" in config else {}
    unread = [key for key in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(key)]
    if unread and any((source / name).is_file() for name in (SINGLE, INDEX)):
        extra = f"model.layers.{model.num_layers}."
        if any(name.startswith(extra) for name in StoredFiles(source).files):
            changes |= dict.fromkeys(unread, 0)
    return changes


def changed(path: Path, changes: Mapping[str, Any]) -> bytes:
    """The bytes of a config.json, rewritten only where something changes."""
    if not changes:
        return path.read_bytes()
    config = {**read_json(path), **changes}
    kept = {key: value for key, value in config.items() if key not in changes or changes[key] is not None}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def companions(source: Path) -> list[Path]:
    """A checkpoint's files besides weights and config.json: generation settings, tokenizer, chat templates."""
    found = []
    for pattern in ("generation_config.json", *TOKENIZER_FILES):
        inside, _, name = pattern.rpartition("/")
        folder = source / inside
        # By their names: one that is listed and cannot be read must not be passed over.
        listed = sorted(os.listdir(folder)) if folder.is_dir() else []
        found += [folder / one for one in listed if fnmatch(one, name)]
    return found


def read_companions(source: Path) -> dict[str, bytes]:
    """Their contents, by their places; UserError for one that cannot be read."""
    try:
        return {str(path.relative_to(source)): path.read_bytes() for path in companions(source)}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def check_target(folder: Path, source: Path, *, overwrite: bool, owner: Owner | None = None) -> None:
    """UserError unless `folder` may be written to: new, empty, or with `overwrite` an earlier export (of `owner`)."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_mount():
        raise UserError(f"{folder} is a disk of its own, which cannot be renamed; needed: a new directory inside it")
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"{folder} exists and is not a directory; needed: a new or empty directory")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the model the export starts from; needed: another directory")
    if not any(folder.iterdir()):
        return
    allowed = "a new or empty directory" + (", or an earlier export" if overwrite else "")
    if not (overwrite and is_export(folder)):
        raise UserError(f"{folder} exists and is not empty; needed: {allowed}")
    if owner is not None and not owner.made(folder):
        by = made_by(folder).get("run")
        told = "does not say which run made it" if by is None else f"is another job's, whose run.dir is {by}"
        told = "is of this run.dir's job before its settings or data changed" if by == owner.run else told
        raise UserError(f"{folder} {told}; needed: {allowed} of this run")


def is_export(folder: Path) -> bool:
    """Whether the directory is an earlier export and holds nothing else that a replacement would lose."""
    named = {MARK, "config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    named |= {path.relative_to(folder).parts[0] for path in companions(folder)}
    adapter = folder / ADAPTER
    if adapter.is_dir() and all(path.name in ADAPTER_FILES for path in adapter.iterdir()):
        named.add(ADAPTER)
    return (folder / MARK).is_file() and all(path.name in named for path in folder.iterdir())
