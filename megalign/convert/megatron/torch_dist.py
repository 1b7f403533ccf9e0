"""Reads and writes Megatron-Core's `torch_dist` checkpoints, tensor by tensor and without Megatron.

The format is torch's distributed checkpoint: `.metadata` maps the chunks of each tensor to ranges of files, and each
range is an output of `torch.save`; `common.pt` holds plain values and `metadata.json` names the format. Megatron's own
writer is not used, because it needs all tensors in memory at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import mmap
import pickle
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

from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.megatron.checkpoint_dir import MARK
from megalign.files import sync, write_at, write_whole, writing
from megalign.schema import UserError, reason_of

INDEX, COMMON = ".metadata", "common.pt"
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


class _WithHole(io.RawIOBase):
    """Wraps a file for `torch.save` under `skip_data`; `hole` is the offset of the skipped tensor data."""

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
    """Appends tensors and small objects to one file of a checkpoint; `entries` lists their byte ranges."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[list[Any]] = []  # key, offset, shape, first byte, bytes
        with writing(path):
            self.file = open(path, "wb")  # noqa: SIM115  (closed in `close`)

    def append(self, key: str, index: tuple[int, ...], spec: Spec, blocks: Sequence[Tensor]) -> None:
        """Append the part of the tensor `key` at `index` in its first dimensions; `blocks` are runs of its rows."""
        if sum(block.nbytes for block in blocks) != spec.num_bytes or any(
            block.dtype != spec.dtype for block in blocks
        ):
            raise ValueError(
                f"{key} is announced as {spec}, and comes as {[(block.shape, block.dtype) for block in blocks]}"
            )
        # Its pages are never touched, so it takes no memory; the blocks are written without being joined first.
        chunk = torch.empty((1,) * len(index) + spec.shape, dtype=spec.dtype)
        begin, hole = self.file.tell(), _WithHole(self.file)
        with skip_data():
            self._save(chunk, hole)
        offset = hole.hole
        for block in blocks:
            flat = block.contiguous().reshape(-1).view(torch.uint8)
            self._put(flat.numpy().data, offset)
            offset += block.nbytes
        self.entries.append([key, [*index, *[0] * len(spec.shape)], list(chunk.shape), begin, self.file.tell() - begin])

    def append_empty_state(self, key: str) -> None:
        """Append the empty extra state that Megatron saves beside a weight."""
        begin = self.file.tell()
        self._save([None], self.file)
        self.entries.append([key, None, None, begin, self.file.tell() - begin])

    def _save(self, value: Any, file: Any) -> None:
        try:
            torch.save(value, file)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            reason = error.strerror if isinstance(error, OSError) else "No space left on device, or it failed"
            raise UserError(f"{self.path} cannot be written: {reason}") from None

    def _put(self, content: memoryview, offset: int) -> None:
        with writing(self.path):
            write_at(self.file.fileno(), content, offset)

    def close(self) -> None:
        """Sync the file to disk and close it."""
        try:
            with writing(self.path):
                self.file.flush()
                sync(self.file.fileno())
        finally:
            with contextlib.suppress(OSError):
                self.file.close()


def write_index(
    folder: Path, specs: Mapping[str, Spec], entries: Mapping[str, Sequence[Any]], common: Mapping[str, Any]
) -> None:
    """Write index, common values and format file of a folder of `TorchDistFile`s.

    specs: the tensors by key. entries: `TorchDistFile.entries` by file name. common: the plain values.
    """
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
    index = Metadata(tensors, planner_data=None, storage_data=storage)
    contents: dict[str, bytes | str] = {
        COMMON: values.getvalue(),
        MARK: json.dumps(FORMAT_TEXT),
        INDEX: pickle.dumps(index),
    }
    for name, content in contents.items():
        with writing(folder / name):
            write_whole(folder / name, content)


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
        for entry, info in self.index.storage_data.items():
            if isinstance(self.index.state_dict_metadata.get(entry.fqn), BytesStorageMetadata):
                try:
                    inside = _Window(self._mapped(info.relative_path), info.offset, info.length)
                    torch.load(cast(IO[bytes], inside), map_location="cpu", weights_only=True)
                except Exception as error:
                    file = self.folder / info.relative_path
                    raise UserError(f"{file}: {entry.fqn} cannot be read: {reason_of(error)}") from None

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
        filled = 0
        for offsets, part in parts:
            whole[tuple(slice(b, b + size) for b, size in zip(offsets, part.shape, strict=True))].copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"{self.folder}: tensor {key} has {filled} of {whole.numel()} values at {list(begin)}")
        return whole.reshape(shape)

    def _overlapping(
        self, key: str, begin: tuple[int, ...], end: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield (offsets in the region, values) for each chunk that overlaps the region from `begin` to `end`."""
        metadata = self.index.state_dict_metadata[key]
        assert isinstance(metadata, TensorStorageMetadata)
        for number, chunk in enumerate(metadata.chunks):
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
