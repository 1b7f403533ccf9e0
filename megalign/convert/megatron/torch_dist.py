"""Reads Megatron-Core's `torch_dist` checkpoints, tensor by tensor and without Megatron.

The format is torch's distributed checkpoint: `.metadata` maps the chunks of each tensor to ranges of files, and each
range is an output of `torch.save`; `common.pt` holds plain values and `metadata.json` names the format.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megalign.convert.hf.safetensors_file import Spec
from megalign.schema import UserError, reason_of

INDEX, COMMON = ".metadata", "common.pt"
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


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's index; UnpicklingError where the pickle names any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INDEX_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> Metadata:
    """Read a checkpoint's index, which is a pickle; UserError where it is damaged or could run code."""
    try:
        with open(folder / INDEX, "rb") as file:
            index = _PlainUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(index).__name__}")
        for info in index.storage_data.values():
            if not isinstance(info.relative_path, str) or min(info.offset, info.length) < 0:
                raise pickle.UnpicklingError(f"it holds {info}")
    except Exception as error:
        needed = "must be the index of a checkpoint that megalign wrote"
        raise UserError(f"{folder}/.metadata: {reason_of(error)}; {needed}") from None
    return index


class TorchDistReader:
    """Reads the tensors of a checkpoint lazily, from mapped files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.maps: dict[str, mmap.mmap] = {}
        # by key: chunks by first offset with their numbers in the index, the first offsets, the longest first dimension
        self.sorted_chunks: dict[str, tuple[list[tuple[int, ChunkStorageMetadata]], list[tuple[int, ...]], int]] = {}
        self.specs = {
            key: Spec(tuple(metadata.size), metadata.properties.dtype)
            for key, metadata in self.index.state_dict_metadata.items()
            if isinstance(metadata, TensorStorageMetadata)
        }

    def common(self) -> dict[str, Any]:
        """Read the plain values saved beside the tensors."""
        path = self.folder / COMMON
        try:
            return dict(torch.load(path, weights_only=True))
        except Exception as error:
            raise UserError(f"{path} cannot be read: {reason_of(error)}") from None

    def check_objects(self) -> None:
        """Raise UserError where an object saved beside the tensors is more than plain values.

        torch's own loader unpickles them unchecked.
        """
        for key, metadata in self.index.state_dict_metadata.items():
            if isinstance(metadata, BytesStorageMetadata):
                self.object(key)

    def object(self, key: str) -> Any:
        """Return an object saved beside the tensors; UserError where it is more than plain values."""
        info = self.index.storage_data[MetadataIndex(key)]
        try:
            inside = _Window(self._mapped(info.relative_path), info.offset, info.length)
            (value,) = torch.load(cast(IO[bytes], inside), map_location="cpu", weights_only=True)
        except Exception as error:
            file = self.folder / info.relative_path
            raise UserError(f"{file}: {key} cannot be read: {reason_of(error)}") from None
        return value

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read the part of the tensor `key` at `index` in its first dimensions; a view of the file if in one chunk."""
        spec = self.specs[key]
        shape = spec.shape[len(index) :]
        begin = (*index, *[0] * len(shape))
        end = (*(position + 1 for position in index), *shape)
        parts = list(self._overlapping(key, begin, end))
        if len(parts) == 1 and parts[0][1].numel() == math.prod(shape):
            return parts[0][1].reshape(shape)
        whole = torch.empty(tuple(e - b for b, e in zip(begin, end, strict=True)), dtype=spec.dtype)
        self.read_into(key, begin, whole)
        return whole.reshape(shape)

    def read_into(self, key: str, offset: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with the part of the tensor `key` at `offset`; UserError where it does not hold all of it."""
        filled = 0
        end = tuple(begin + size for begin, size in zip(offset, out.shape, strict=True))
        for inside, part in self._overlapping(key, offset, end):
            target = out[tuple(slice(b, b + size) for b, size in zip(inside, part.shape, strict=True))]
            target.copy_(part)
            filled += part.numel()
        if filled != out.numel():
            raise UserError(f"{self.folder}: tensor {key} has {filled} of {out.numel()} values at {list(offset)}")

    def _overlapping(
        self, key: str, begin: tuple[int, ...], end: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield (offsets in the region, values) for each chunk that overlaps the region from `begin` to `end`."""
        for number, chunk in self._near(key, begin, end):
            low = tuple(max(b, offset) for b, offset in zip(begin, chunk.offsets, strict=True))
            high = tuple(min(e, offset + size) for e, offset, size in zip(end, chunk.offsets, chunk.sizes, strict=True))
            if all(a < b for a, b in zip(low, high, strict=True)):
                info = self.index.storage_data[MetadataIndex(key, chunk.offsets, number)]
                values = self._chunk(info, self.specs[key].dtype, tuple(chunk.sizes), key)
                inside = tuple(
                    slice(a - offset, b - offset) for a, b, offset in zip(low, high, chunk.offsets, strict=True)
                )
                yield tuple(a - b for a, b in zip(low, begin, strict=True)), values[inside]

    def _near(self, key: str, begin: tuple[int, ...], end: tuple[int, ...]) -> list[tuple[int, ChunkStorageMetadata]]:
        """Return the chunks, with their numbers, that overlap a region in its first dimension, and maybe others."""
        if key not in self.sorted_chunks:
            metadata = self.index.state_dict_metadata[key]
            assert isinstance(metadata, TensorStorageMetadata)
            numbered = sorted(enumerate(metadata.chunks), key=lambda item: item[1].offsets[:1])
            longest = max((chunk.sizes[0] for chunk in metadata.chunks if chunk.sizes), default=1)
            self.sorted_chunks[key] = numbered, [tuple(chunk.offsets[:1]) for _, chunk in numbered], longest
        numbered, firsts, longest = self.sorted_chunks[key]
        if not begin:
            return numbered
        return numbered[bisect_right(firsts, (begin[0] - longest,)) : bisect_left(firsts, (end[0],))]

    def _chunk(self, info: Any, dtype: torch.dtype, shape: tuple[int, ...], key: str) -> Tensor:
        """Return a chunk as a view of its mapped file: `torch.save` stores tensor data uncompressed in a zip."""
        path = self.folder / info.relative_path
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        try:
            inside = _Window(self._mapped(info.relative_path), info.offset, info.length)
            skeleton = torch.load(cast(IO[bytes], inside), map_location="meta", weights_only=True)
            record = zipfile.ZipFile(inside).getinfo("archive/data/0")
            inside.seek(record.header_offset + 26)  # a local header has 30 bytes; the last 4 are two lengths
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
                raise UserError(f"{self.folder}/.metadata names {file!r}; must be files beside it")
            with open(path, "rb") as handle:
                self.maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.maps[file]


class _Window(io.RawIOBase):
    """Presents a byte range of a mapped file as a file object."""

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
