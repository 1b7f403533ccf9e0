"""Megatron-Core's `torch_dist` checkpoints, read and written a tensor at a time without Megatron.

The format is torch's distributed checkpoint: `.metadata` says where the chunks of each tensor lie in files, which are
outputs of `torch.save` end to end; `common.pt` holds plain values and `metadata.json` names the format. Megatron's own
writer would hold every tensor before it writes the first.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import skip_data

from megalign.convert.model_config import ModelConfig
from megalign.convert.partial import write_at, write_synced
from megalign.convert.rules import find_rule
from megalign.convert.safetensors_file import Spec
from megalign.schema import UserError, reason_of

INDEX, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
FORMAT_TEXT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT_TEXT |= {"common_backend": "torch", "common_backend_version": 1}
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
INDEX_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
# Megatron names a norm as TransformerEngine does, which fuses it into the linear layer behind it.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# Layers of which Megatron saves an empty extra state, as TransformerEngine's have one for FP8.
_WITH_STATE = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2|q_proj|q_up_proj|kv_up_proj))\.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(.*)")


def place_of(name: str, cfg: ModelConfig) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(key, index, counts): where a Megatron parameter lies in a checkpoint.

    Layers of a model without experts are stacked under one key, and so are the experts of a layer; counts: how many.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, (), ()
    layer, rest = int(match[1]), match[2]
    for norm, fused in FUSED_NORMS.items():
        rest = rest.replace(norm, fused) if rest.startswith(norm) else rest
    if cfg.moe is None:
        return f"decoder.layers.{rest}", (layer,), (cfg.num_layers,)
    expert = _EXPERT.fullmatch(f"decoder.layers.{layer}.{rest}")
    if expert is None:
        return f"decoder.layers.{layer}.{rest}", (), ()
    return f"{expert[1]}.experts.{expert[3]}", (int(expert[2]),), (cfg.moe.num_experts,)


def whole_shape(name: str, cfg: ModelConfig) -> tuple[int, ...]:
    """The shape of a Megatron parameter on one rank, the padding of the vocabulary included."""
    rule, _ = find_rule(name, cfg)
    pieces = [torch.empty(piece.shape(cfg), device="meta") for piece in rule.pieces]
    shape = tuple(rule.layout.join(pieces, cfg).shape)
    return (cfg.padded_vocab_size, *shape[1:]) if rule.pieces[0].axes[0] == "vocab" else shape


def extra_state_of(name: str, cfg: ModelConfig) -> str | None:
    """The key of the empty extra state that Megatron saves beside some weights."""
    match = _WITH_STATE.fullmatch(name)
    if match is None:
        return None
    key, index, counts = place_of(name, cfg)
    number, count = (index[0], counts[0]) if index else (0, 1)
    return f"{key.removesuffix('.weight')}._extra_state/shard_{number}_{count}"


class _WithHole(io.RawIOBase):
    """A file as `torch.save` writes to it when it skips a tensor's data: `hole` is where they belong."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.file, self.hole = file, 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self.file.write(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.hole = self.file.tell()
        return self.file.seek(offset, whence)


class TorchDistFile:
    """One file of a checkpoint: tensors and small objects, appended; `entries` says where they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[list[Any]] = []  # key, offset, shape, first byte, bytes
        try:
            self.file = open(path, "wb")  # noqa: SIM115  (closed in `close`)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def append(self, key: str, index: tuple[int, ...], spec: Spec, blocks: Sequence[Tensor]) -> None:
        """A chunk of what lies under `key`: at `index` of its first dimensions; given as runs of its rows, in order."""
        if sum(block.nbytes for block in blocks) != spec.num_bytes or any(one.dtype != spec.dtype for one in blocks):
            raise ValueError(f"{key} is announced as {spec}, and comes as {[(one.shape, one.dtype) for one in blocks]}")
        # Never touched, so it takes no memory: the blocks go to the file without being joined first.
        chunk = torch.empty((1,) * len(index) + spec.shape, dtype=spec.dtype)
        begin, hole = self.file.tell(), _WithHole(self.file)
        with skip_data():
            self._save(chunk, hole)
        place = hole.hole
        for block in blocks:
            flat = block.contiguous().reshape(-1).view(torch.uint8)
            self._put(flat.numpy().data, place)
            place += block.nbytes
        self.entries.append([key, [*index, *[0] * len(spec.shape)], list(chunk.shape), begin, self.file.tell() - begin])

    def append_empty_state(self, key: str) -> None:
        begin = self.file.tell()
        self._save([None], self.file)
        self.entries.append([key, None, None, begin, self.file.tell() - begin])

    def _save(self, value: Any, file: Any) -> None:
        try:
            torch.save(value, file)
        except (OSError, RuntimeError) as error:
            # A full disk shows as a broken zip writer.
            reason = error.strerror if isinstance(error, OSError) else "No space left on device, or it failed"
            raise UserError(f"{self.path} cannot be written: {reason}") from None

    def _put(self, content: memoryview, place: int) -> None:
        try:
            write_at(self.file.fileno(), content, place)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Bring the file to the disk."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                self.file.close()


def write_index(
    folder: Path, specs: Mapping[str, Spec], entries: Mapping[str, Sequence[Any]], common: Mapping[str, Any]
) -> None:
    """The files that make a folder of `TorchDistFile`s a checkpoint; specs by key, entries by file name."""
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), [])
        for key, spec in specs.items()
    }
    storage = {}
    for name, listed in entries.items():
        for key, offset, shape, begin, length in listed:
            info = _StorageInfo(name, begin, length)
            if offset is None:
                tensors[key] = BytesStorageMetadata()
                storage[MetadataIndex(key)] = info
                continue
            chunks = tensors[key].chunks
            storage[MetadataIndex(key, torch.Size(offset), len(chunks))] = info
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
    values = io.BytesIO()
    torch.save(dict(common), values)
    write_synced(folder / COMMON, values.getvalue())
    write_synced(folder / FORMAT, json.dumps(FORMAT_TEXT).encode())
    write_synced(folder / INDEX, pickle.dumps(Metadata(tensors, planner_data=None, storage_data=storage)))


class _PlainUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index of tensors, and refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INDEX_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> Metadata:
    """A checkpoint's index, which is a pickle by torch's format; UserError where it could run code."""
    try:
        with open(folder / INDEX, "rb") as file:
            found = _PlainUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
        for info in found.storage_data.values():
            if not isinstance(info.relative_path, str) or min(info.offset, info.length) < 0:
                raise pickle.UnpicklingError(f"it holds {info}")
    except Exception as error:
        needed = "needed: the index of a checkpoint that megalign wrote"
        raise UserError(f"{folder}/.metadata: {reason_of(error)}; {needed}") from None
    return found


class TorchDistReader:
    """The tensors of a checkpoint, mapped into memory: nothing is read before it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.maps: dict[str, mmap.mmap] = {}
        self.specs = {
            key: Spec(tuple(found.size), found.properties.dtype)
            for key, found in self.index.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def common(self) -> dict[str, Any]:
        """The plain values saved beside the tensors."""
        path = self.folder / COMMON
        try:
            return dict(torch.load(path, weights_only=True))
        except Exception as error:
            raise UserError(f"{path} cannot be read: {reason_of(error)}") from None

    def check_objects(self) -> None:
        """UserError where one of the small objects beside the tensors is more than plain values.

        torch's own loader unpickles them without looking.
        """
        for place, info in self.index.storage_data.items():
            if isinstance(self.index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
                try:
                    inside = _Window(self._mapped(info.relative_path), info.offset, info.length)
                    torch.load(cast(IO[bytes], inside), map_location="cpu", weights_only=True)
                except Exception as error:
                    file = self.folder / info.relative_path
                    raise UserError(f"{file}: {place.fqn} cannot be read: {reason_of(error)}") from None

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """What lies under `key` at `index` of its first dimensions; a view of the file where it is in one chunk."""
        spec = self.specs[key]
        shape = spec.shape[len(index) :]
        begin = (*index, *[0] * len(shape))
        end = (*(one + 1 for one in index), *shape)
        parts = list(self._overlapping(key, begin, end))
        if len(parts) == 1 and parts[0][1].numel() == math.prod(shape):
            return parts[0][1].reshape(shape)
        whole = torch.empty(tuple(e - b for b, e in zip(begin, end, strict=True)), dtype=spec.dtype)
        filled = 0
        for place, part in parts:
            whole[tuple(slice(b, b + size) for b, size in zip(place, part.shape, strict=True))].copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"{self.folder}: tensor {key} has {filled} of {whole.numel()} values at {list(begin)}")
        return whole.reshape(shape)

    def _overlapping(
        self, key: str, begin: tuple[int, ...], end: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """(place in the region, values) of each chunk's part of a region."""
        found = self.index.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        for number, chunk in enumerate(found.chunks):
            low = tuple(max(b, offset) for b, offset in zip(begin, chunk.offsets, strict=True))
            high = tuple(min(e, offset + size) for e, offset, size in zip(end, chunk.offsets, chunk.sizes, strict=True))
            if all(a < b for a, b in zip(low, high, strict=True)):
                info = self.index.storage_data[MetadataIndex(key, chunk.offsets, number)]
                values = self._chunk(info, self.specs[key].dtype, tuple(chunk.sizes), key)
                inside = tuple(
                    slice(a - offset, b - offset) for a, b, offset in zip(low, high, chunk.offsets, strict=True)
                )
                yield tuple(a - b for a, b in zip(low, begin, strict=True)), values[inside]

    def _chunk(self, info: Any, dtype: torch.dtype, shape: tuple[int, ...], key: str) -> Tensor:
        """A chunk as a view of its file. `torch.save` stores numbers uncompressed in a zip."""
        path = self.folder / info.relative_path
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        try:
            inside = _Window(self._mapped(info.relative_path), info.offset, info.length)
            skeleton = torch.load(cast(IO[bytes], inside), map_location="meta", weights_only=True)
            record = zipfile.ZipFile(inside).getinfo("archive/data/0")
            inside.seek(record.header_offset + 26)  # a local header: 30 bytes, of which the last 4 are two lengths
            lengths = inside.read(4)
            skipped = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            begin = info.offset + record.header_offset + skipped
            good = skeleton.is_contiguous() and tuple(skeleton.shape) == shape and skeleton.dtype == dtype
            if not good or record.compress_type or record.file_size < math.prod(shape) * dtype.itemsize:
                raise ValueError(f"it is {skeleton.dtype} {tuple(skeleton.shape)}, the index says {dtype} {shape}")
            first = begin + skeleton.storage_offset() * dtype.itemsize
            return torch.frombuffer(
                self._mapped(info.relative_path), dtype=dtype, count=math.prod(shape), offset=first
            ).view(shape)
        except Exception as error:
            raise UserError(f"{path}: tensor {key} cannot be read: {reason_of(error)}") from None

    def _mapped(self, file: str) -> mmap.mmap:
        if file not in self.maps:
            path = self.folder / file
            if Path(file).name != file:
                raise UserError(f"{self.folder}/.metadata names {file!r}; needed: files beside it")
            with open(path, "rb") as handle:
                self.maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.maps[file]


class _Window(io.RawIOBase):
    """A part of a mapped file, as a file."""

    def __init__(self, mapped: mmap.mmap, begin: int, length: int) -> None:
        super().__init__()
        self.mapped, self.begin, self.length, self.at = mapped, begin, min(length, len(mapped) - begin), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        first = self.begin + self.at
        count = max(0, min(len(buffer), self.length - self.at))
        buffer[:count] = self.mapped[first : first + count]
        self.at += count
        return count
