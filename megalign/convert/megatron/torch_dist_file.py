"""Writes checkpoints in Megatron-Core's `torch_dist` format, tensor by tensor and without Megatron.

Megatron's own writer is not used, because it needs all tensors in memory at once; `torch_dist` describes the format.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from megalign.convert.megatron.torch_dist import COMMON, INDEX
from megalign.files import CheckedFile, write_whole, writing

FORMAT_TEXT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
FORMAT_TEXT |= {"common_backend": "torch", "common_backend_version": 1}
STAGED_BYTES = 1 << 26  # copied at once from a device, or from a tensor that is not contiguous
ALIGNMENT = 64  # of tensors in a file: torch aligns them in their archive, and the archives are aligned here
HEADER_BYTES = 2048  # at most, of each chunk and object


class _Skeleton(io.RawIOBase):
    """Collects what `torch.save` writes under `skip_data` before and after the data of its one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.skipped = bytearray(), bytearray(), False

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        part = self.after if self.skipped else self.before
        part += content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.skipped = True
        return offset


class TorchDistFile:
    """Appends tensors and small objects to one file of a checkpoint; `entries` lists their byte ranges."""

    def __init__(self, path: Path) -> None:
        self.entries: list[list[Any]] = []  # key, offset, shape, first byte, bytes
        self.file = CheckedFile(path)

    def append(self, key: str, offset: Sequence[int], sizes: Sequence[int], blocks: Sequence[Tensor]) -> None:
        """Append the part of the tensor `key` at `offset`, in row-major order in runs of values of one dtype.

        ValueError where the runs have not as many values as `sizes` says, or different dtypes.
        """
        dtype = blocks[0].dtype
        if sum(block.numel() for block in blocks) != math.prod(sizes) or any(block.dtype != dtype for block in blocks):
            comes = [(tuple(block.shape), block.dtype) for block in blocks]
            raise ValueError(f"{key} is announced as {dtype} {tuple(sizes)}, and comes as {comes}")
        skeleton = _Skeleton()
        with skip_data():
            # Its pages are never touched, so it takes no memory; the values are written without being joined first.
            torch.save(torch.empty(tuple(sizes), dtype=dtype), cast(IO[bytes], skeleton))
        self._align()
        begin = self.file.size
        self.file.write(bytes(skeleton.before))
        for block in blocks:
            for staged, lasting in _staged(block):
                self.file.write(staged, lasting=lasting)
        self.file.write(bytes(skeleton.after))
        self.entries.append([key, list(offset), list(sizes), begin, self.file.size - begin])

    def append_object(self, key: str, value: Any) -> None:
        """Append a small object, such as the empty extra state (None) that Megatron saves beside a weight."""
        held = io.BytesIO()
        torch.save([value], held)
        self._align()
        self.entries.append([key, None, None, self.file.size, held.tell()])
        self.file.write(held.getvalue())

    def _align(self) -> None:
        self.file.write(bytes(-self.file.size % ALIGNMENT))

    def close(self) -> None:
        """Sync the file to disk and close it."""
        self.file.close()

    def abandon(self) -> None:
        """Close the file without syncing it; does nothing when called again."""
        self.file.abandon()


def _staged(values: Tensor) -> Iterator[tuple[memoryview, bool]]:
    """Yield the bytes of a tensor in row-major order, and whether they are its own memory.

    Where they are not at hand, they come through copies of limited size.
    """
    if values.is_contiguous():
        values = values.detach().reshape(-1)
    count = max(1, STAGED_BYTES // values.itemsize // math.prod(values.shape[1:]))
    whole = values.device.type == "cpu" and values.is_contiguous()
    for block in (values,) if whole else values.split(count):
        yield block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, whole


def write_index(
    folder: Path,
    specs: Mapping[str, Spec],
    entries: Mapping[str, Sequence[Any]],
    common: Mapping[str, Any],
    *,
    write: Callable[[Path, bytes | str], None] = write_whole,
) -> None:
    """Write index, common values and format file of a folder of `TorchDistFile`s.

    specs: the tensors by key. entries: `TorchDistFile.entries` by file name. common: the plain values. write: writes
    one of the files.
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
            write(folder / name, content)
