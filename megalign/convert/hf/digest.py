"""Computes cheap fingerprints of checkpoints that do not change when files are moved, renamed or re-sharded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalign.convert.hf.companions import read_companions
from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.weight_files import StoredFiles

WHOLE, PIECE = 65536, 4096  # bytes: read whole up to WHOLE; of larger ranges three samples of PIECE bytes
BOOKKEEPING = ("_name_or_path", "_commit_hash", "transformers_version")  # config.json fields that change no result


def weights_digest(hf_dir: Path) -> str:
    """Digest a Hugging Face checkpoint's config.json and its tensors: names, shapes, dtypes and samples of the bytes.

    Small tensors are digested whole; of a larger one, samples at the start, the middle and the end.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = {key: value for key, value in read_json(hf_dir / "config.json").items() if key not in BOOKKEEPING}
    digest.update(json.dumps(config, sort_keys=True).encode())
    paths, _, _ = StoredFiles.find(hf_dir, allow_pickle=False)
    for name, described, samples in sorted(tensor for path in paths for tensor in _sampled_tensors(path)):
        digest.update(f"{name} {described}".encode() + samples)
    return digest.hexdigest()


def tokenizer_digest(hf_dir: Path) -> str:
    """Digest the files beside the weights: tokenizer, chat templates, generation settings."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in sorted(read_companions(hf_dir).items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Digest names, sizes and samples of all files below a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder)} {size}".encode() + _samples(file.fileno(), 0, size))
    return digest.hexdigest()


def _sampled_tensors(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield (name, dtype and shape, samples) of each tensor of a safetensors file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = about["data_offsets"]
            samples = _samples(file.fileno(), 8 + size + first, last - first)
            yield name, f"{about['dtype']} {about['shape']}", samples


def _samples(handle: int, first: int, size: int) -> bytes:
    """Read a small range of a file whole, and samples at the start, the middle and the end of a larger one."""
    if size <= WHOLE:
        return os.pread(handle, size, first)
    return b"".join(os.pread(handle, PIECE, first + at) for at in (0, size // 2, size - PIECE))
