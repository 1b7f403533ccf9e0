"""Writing a Hugging Face checkpoint tensor by tensor, visible under its name only once it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalign.convert.config_file import read_json
from megalign.convert.hf_config import read_model_config
from megalign.convert.reader import INDEX, SINGLE, TOKENIZER_FILES, audit
from megalign.schema import UserError

DEFAULT_SHARD_BYTES = 5_000_000_000
ADAPTER, ADAPTER_FILES = "adapter", ("adapter_model.safetensors", "adapter_config.json")
MARK = ".megalign_export"  # an empty file: only a directory that bears it is ever replaced


class HFWriter:
    """Streams tensors into the checkpoint `folder`, with the configuration and tokenizer of `source`.

    Everything goes to a hidden directory beside `folder`, which takes its name in `close`, after the result passed the
    audit that reading makes; an exception inside `with` leaves nothing. At most one shard is held in memory.
    An existing `folder` must be empty or, with `overwrite`, an earlier export other than `source`.
    `dtype` None writes tensors as they come.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: Path,
        dtype: torch.dtype | None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.source = Path(folder).absolute(), Path(source)
        check_target(self.folder, self.source, overwrite=overwrite)
        read_json(self.source / "config.json")
        self.dtype, self.max_shard_bytes, self.overwrite = dtype, max_shard_bytes, overwrite
        self.partial = self.folder.with_name(f".{self.folder.name}.partial-{os.getpid()}")
        self.shard: dict[str, Tensor] = {}
        self.shard_bytes = 0
        self.shards: list[list[str]] = []
        self.added: set[str] = set()
        self.total_bytes, self.total_numbers = 0, 0
        self.dtypes: set[torch.dtype] = set()
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; its value is copied, so it may change afterwards."""
        if name in self.added:
            raise ValueError(f"{name} was added twice")
        self.added.add(name)
        copy = torch.empty(tensor.shape, dtype=self.dtype or tensor.dtype).copy_(tensor.detach())
        if self.shard and self.shard_bytes + copy.nbytes > self.max_shard_bytes:
            self._flush()
        self.shard[name] = copy
        self.shard_bytes += copy.nbytes
        self.total_bytes += copy.nbytes
        self.total_numbers += copy.numel()
        self.dtypes.add(copy.dtype)

    def add_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Put a LoRA adapter into the folder `adapter`, from which `peft` loads it onto `source`."""
        folder = self.partial / ADAPTER
        folder.mkdir()
        weights, settings = (folder / name for name in ADAPTER_FILES)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
        sync(weights)
        _write_bytes(settings, (json.dumps(config, indent=2) + "\n").encode())
        sync(folder)

    def close(self) -> None:
        """Finish, check and publish the checkpoint."""
        try:
            self._flush()
            self._name_shards()
            self._copy_companions()
            self._write_config()
            try:
                audit(self.partial, read_model_config(self.partial))
            except UserError as error:
                raise RuntimeError(f"the export to {self.folder} is not a whole checkpoint: {error}") from error
            self._publish()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Remove what was written; the target stays as it was."""
        self.shard = {}
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _flush(self) -> None:
        if self.shard:
            path = self.partial / f"{len(self.shards)}.safetensors"
            save_file(self.shard, path, metadata={"format": "pt"})
            sync(path)
            self.shards.append(list(self.shard))
            self.shard, self.shard_bytes = {}, 0

    def _name_shards(self) -> None:
        """Final names need the number of shards, which only the end knows."""
        count = len(self.shards)
        weight_map = {}
        for place, names in enumerate(self.shards):
            file = SINGLE if count == 1 else f"model-{place + 1:05}-of-{count:05}.safetensors"
            (self.partial / f"{place}.safetensors").rename(self.partial / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            metadata = {"total_parameters": self.total_numbers, "total_size": self.total_bytes}
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            _write_bytes(self.partial / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _copy_companions(self) -> None:
        (self.partial / MARK).touch()
        for path in companions(self.source):
            copy = self.partial / path.relative_to(self.source)
            copy.parent.mkdir(exist_ok=True)
            _write_bytes(copy, path.read_bytes())

    def _write_config(self) -> None:
        """The source's bytes, unless the weights are of another dtype than it says."""
        path = self.source / "config.json"
        config = read_json(path)
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        written = str(next(iter(self.dtypes))).removeprefix("torch.") if len(self.dtypes) == 1 else config.get(key)
        if config.get(key) == written:
            _write_bytes(self.partial / "config.json", path.read_bytes())
        else:
            text = json.dumps({**config, key: written}, indent=2, ensure_ascii=False) + "\n"
            _write_bytes(self.partial / "config.json", text.encode())

    def _publish(self) -> None:
        check_target(self.folder, self.source, overwrite=self.overwrite)  # it may have come up since
        sync(self.partial)
        replaced = self.folder.with_name(f".{self.folder.name}.replaced-{os.getpid()}")
        replaces = self.folder.exists()
        if replaces:
            self.folder.rename(replaced)
        try:
            self.partial.rename(self.folder)
        except OSError:
            if replaces:
                replaced.rename(self.folder)
            raise
        sync(self.folder.parent)
        if replaces:
            shutil.rmtree(replaced)


def companions(source: Path) -> list[Path]:
    """A checkpoint's files besides weights and config.json: generation settings, tokenizer, chat templates."""
    patterns = ("generation_config.json", *TOKENIZER_FILES)
    return [path for pattern in patterns for path in sorted(source.glob(pattern))]


def check_target(folder: Path, source: Path, *, overwrite: bool) -> None:
    """UserError unless `folder` may be written to: new, empty, or with `overwrite` an earlier export."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"{folder} exists and is not a directory; needed: a new or empty directory")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the model the export starts from; needed: another directory")
    if not any(folder.iterdir()):
        return
    if not (overwrite and _is_ours(folder)):
        allowed = "a new or empty directory" + (", or an earlier export" if overwrite else "")
        raise UserError(f"{folder} exists and is not empty; needed: {allowed}")


def _is_ours(folder: Path) -> bool:
    """Whether the directory is an earlier export and holds nothing else that a replacement would lose."""
    named = {MARK, "config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    named |= {path.relative_to(folder).parts[0] for path in companions(folder)}
    adapter = folder / ADAPTER
    if adapter.is_dir() and all(path.name in ADAPTER_FILES for path in adapter.iterdir()):
        named.add(ADAPTER)
    return (folder / MARK).is_file() and all(path.name in named for path in folder.iterdir())


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """What is renamed into place must be on the disk before its name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
