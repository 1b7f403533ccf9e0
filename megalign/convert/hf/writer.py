"""Writes a Hugging Face checkpoint tensor by tensor; it appears under its final name only when complete."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megalign.convert.hf.auto_model import meta_model
from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.auto_source import check_auto_weights
from megalign.convert.hf.companions import changed_config, config_changes, read_companions
from megalign.convert.hf.export_dir import ADAPTER, ADAPTER_FILES, MARK, Owner, check_target
from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.hf.reader import audit, needed_shapes
from megalign.convert.hf.safetensors_file import SafetensorsFile, Spec, plan_shards
from megalign.convert.hf.weight_files import INDEX, SINGLE
from megalign.convert.rules import FAMILIES
from megalign.files import PartialFolder, sync
from megalign.model_config import ModelConfig
from megalign.schema import UserError

DEFAULT_SHARD_BYTES = 5_000_000_000


class HFWriter:
    """Writes tensors, in any order, to the checkpoint `folder`, with the configuration and tokenizer of `source`.

    Files are written to a hidden directory beside `folder`, which `close` audits and renames. An exception inside
    `with` removes it, except that with `key` finished files are kept for a later writer with the same key. Written
    tensors are not kept in memory. Safe for several threads. An existing `folder` must be empty or, with `overwrite`,
    an earlier export (of `owner` where given) other than `source`.
    specs: the tensors to be written; by default those of the model in `source`, in `dtype` or, where that is None, in
    the dtype of the first tensor added.
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
        self.hf_model = read_model(self.source)
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
                self._plan(specs if specs is not None else specs_of(self.hf_model, dtype or torch.float32))
            except UserError:
                self.abandon()
                raise

    def _plan(self, specs: Mapping[str, Spec]) -> None:
        """Assign tensors to files, and check the free disk space."""
        self.specs = dict(specs)
        shards = plan_shards(self.specs, self.max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self.file_of.update(dict.fromkeys(shard, file))
        self.partial.need(sum(self.specs[name].num_bytes for name in self.missing))

    @property
    def missing(self) -> list[str]:
        """List the tensors of files that no earlier writer with the same key has finished."""
        return [name for name, file in self.file_of.items() if file not in self.partial.done]

    def _opened(self, file: str) -> SafetensorsFile:
        with self.lock:
            if file not in self.open:
                specs = {name: spec for name, spec in self.specs.items() if self.file_of[name] == file}
                self.open[file] = SafetensorsFile(self.partial.path / file, specs)
            return self.open[file]

    def share(self) -> SharedFiles:
        """Create all files, for `HFPart`s in other processes; pass what each of them wrote to `received`."""
        for file in dict.fromkeys(self.file_of.values()):
            self._opened(file)
        return SharedFiles(self.partial.path, {file: shard.specs for file, shard in self.open.items()})

    def received(self, written: Mapping[str, Iterable[tuple[str, int | None]]]) -> None:
        """Note what another process wrote: {file: (tensor, row or None), ...}, from `HFPart.close`."""
        for file, names in written.items():
            for name, row in names:
                self.open[file].mark(name, row)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, converted to the dtype of its spec."""
        if not self.specs:
            self._plan(specs_of(self.hf_model, tensor.dtype))
        if name not in self.specs:
            raise ValueError(f"{name} is no tensor of this checkpoint")
        file = self.file_of[name]
        shard = self._opened(file)
        shard.write(name, converted(name, tensor, self.specs[name].dtype))
        with self.lock:
            finished = file not in self.finished and not shard.missing
            self.finished |= {file} if finished else set()
        if finished:  # outside the lock, because it waits for the disk
            shard.close()
            self.partial.finish(file)

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write a LoRA adapter to the folder `adapter`, in PEFT's format."""
        folder = self.partial.path / ADAPTER
        folder.mkdir(exist_ok=True)
        weights, settings = (folder / name for name in ADAPTER_FILES)
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, weights, metadata={"format": "pt"})
            sync(weights)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights} cannot be written: {error}") from None
        self.partial.write(f"{ADAPTER}/{settings.name}", (json.dumps(config, indent=2) + "\n").encode())
        sync(folder)

    def close(self) -> None:
        """Complete the checkpoint, audit it, and rename it to `folder`."""
        try:
            left = self._left()
            if left or not self.specs:
                raise RuntimeError(f"the export to {self.folder} is not a whole checkpoint: {left[:1]} is missing")
            for shard in self.open.values():
                if not shard.closed:  # written by other processes
                    shard.close()
            self._write_index()
            self.partial.write(MARK, b"" if self.owner is None else self.owner.mark())
            for name, content in self.beside.items():
                self.partial.write(name, content)
            self._write_config()
            try:
                _audit_written(read_model(self.partial.path))
            except UserError as error:
                raise RuntimeError(f"the export to {self.folder} is not a whole checkpoint: {error}") from error
            # Checked again, because the target may have changed since.
            check_target(self.folder, self.source, overwrite=self.overwrite, owner=self.owner)
        except BaseException as error:
            self.abandon(keep=not isinstance(error, UserError | RuntimeError | ValueError | OSError))
            raise
        self.partial.publish()

    def _left(self) -> list[str]:
        """List tensors that are not written."""
        unfinished = [name for name in self.missing if self.file_of[name] not in self.open]
        return unfinished + [name for shard in self.open.values() for name in shard.missing]

    def abandon(self, *, keep: bool = False) -> None:
        """Remove what was written, or with `keep` keep finished files for a later writer; `folder` is untouched."""
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
            self.partial.write(INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _write_config(self) -> None:
        """Write config.json: the source's own bytes, unless dtype, quantisation or MTP layers differ."""
        hf, changes = self.hf_model.hf, config_changes(self.hf_model)
        keys = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
        fixed = _fixed_names(self.hf_model)
        dtypes = {spec.dtype for name, spec in self.specs.items() if name not in fixed}
        if len(dtypes) == 1:
            written = str(next(iter(dtypes))).removeprefix("torch.")
            changes |= {key: written for key in keys if hf.get(key) != written}
        self.partial.write("config.json", changed_config(self.hf_model, changes))


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """Describes files that several processes write together; made by `HFWriter.share`, sent to the others."""

    folder: Path
    specs: Mapping[str, Mapping[str, Spec]]  # by file


class HFPart:
    """Writes one process's part of a checkpoint that several processes write on a shared file system."""

    def __init__(self, shared: SharedFiles) -> None:
        self.shared = shared
        self.file_of = {name: file for file, specs in shared.specs.items() for name in specs}
        self.open: dict[str, SafetensorsFile] = {}

    def add(self, name: str, tensor: Tensor, row: int | None = None) -> None:
        """Write a tensor or one row of it; UserError where the file is missing here or cannot be written."""
        file = self.file_of[name]
        specs = self.shared.specs[file]
        if file not in self.open:
            self.open[file] = SafetensorsFile(self.shared.folder / file, specs, create=False)
        self.open[file].write(name, converted(name, tensor, specs[name].dtype), row)

    def close(self) -> dict[str, list[tuple[str, int | None]]]:
        """Sync the files to disk, and return what was written: {file: [(tensor, row or None), ...]}."""
        for shard in self.open.values():
            shard.close(partly=True)
        return {file: list(shard.written) for file, shard in self.open.items()}

    def abandon(self) -> None:
        """Close the files without syncing them."""
        for shard in self.open.values():
            if not shard.closed:
                shard.abandon()


def converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor to a dtype; UserError where a finite value overflows."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.isinf(result).sum() > torch.isinf(tensor).sum():
        largest = float(tensor[torch.isfinite(tensor)].abs().max())
        raise UserError(f"tensor {name} holds {largest:g}, more than {dtype} can; must be a wider dtype")
    return result


def specs_of(source: HFModel, dtype: torch.dtype) -> dict[str, Spec]:
    """Return the tensors of a checkpoint of any family in one dtype, except those with a dtype of their own."""
    if source.config is not None:
        return model_specs(source.config, dtype)
    return AutoNames(meta_model(source.folder, dtype=dtype)).specs


def _fixed_names(source: HFModel) -> set[str]:
    """Return the names of tensors with a dtype of their own."""
    if source.config is not None:
        return set(fixed_dtypes(source.config))
    half = torch.bfloat16
    return {name for name, spec in specs_of(source, half).items() if spec.dtype != half}


def _audit_written(written: HFModel) -> None:
    """Raise UserError where a written checkpoint is not whole."""
    if written.config is not None:
        audit(written.folder, written.config)
    else:
        check_auto_weights(written)


def model_specs(model: ModelConfig, dtype: torch.dtype) -> dict[str, Spec]:
    """Return the tensors of a model's checkpoint in one dtype, except those with a dtype of their own."""
    fixed = fixed_dtypes(model)
    return {name: Spec(shape, fixed.get(name, dtype)) for name, shape in needed_shapes(model).items()}


def fixed_dtypes(model: ModelConfig) -> dict[str, torch.dtype]:
    """Return {name: dtype} of tensors that keep their own dtype (e.g. the routing bias in fp32)."""
    experts = range(0 if model.moe is None else model.moe.num_experts)
    return {
        piece.name.format(**indices): rule.dtype
        for rule in FAMILIES[model.family].rules
        if rule.dtype is not None
        for indices in rule.indices(model, range(model.num_layers), experts)
        for piece in rule.pieces
    }
