"""Lists the files that a job reads, and takes quick hashes of them, by which ranks compare what they read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megalign.config.job import JobConfig, dump_config, scored_models
from megalign.convert.hf.reader import HUB_MODEL, TOKENIZER_FILES, cached_model

WHOLE_BYTES = 1 << 20  # files up to this size are hashed whole
BLOCK_BYTES = 64 << 10  # of larger ones some blocks: the first holds a safetensors file's header
NUM_BLOCKS = 5
MODEL_FILES = ("*.json", "*.safetensors", *TOKENIZER_FILES)


@dataclass(frozen=True, slots=True)
class Input:
    """Names something that a job reads: a file, or a folder with the patterns of its files."""

    field: str
    shown: str  # as the configuration has it
    path: Path | None  # None: it is not here
    patterns: tuple[str, ...] = ("*",)

    def files(self) -> dict[str, Path]:
        """Return {name: path} of its files."""
        if self.path is None or not self.path.exists():
            return {}
        if not self.path.is_dir():
            return {self.path.name: self.path}
        found = (file for pattern in self.patterns for file in self.path.glob(pattern) if file.is_file())
        return {str(file.relative_to(self.path)): file for file in sorted(set(found))}


def inputs_of(cfg: JobConfig, config_file: Path | None) -> list[Input]:
    """Return what the job reads, the configuration's file included."""
    found = [] if config_file is None else [Input("configuration", str(config_file), config_file)]
    models = {"model.path": cfg.model.path, **scored_models(cfg)}
    found += [Input(field, path, _model_folder(path), MODEL_FILES) for field, path in models.items()]
    data = {"data.path": cfg.data.path, "eval.path": cfg.eval.path}
    data |= {f"data.sources.{index}.path": source.path for index, source in enumerate(cfg.data.sources or ())}
    data["rollout.path"] = None if cfg.rollout is None else cfg.rollout.path
    found += [Input(field, path, Path(path)) for field, path in data.items() if path is not None]
    if cfg.checkpoint.resume not in ("auto", "never"):
        found.append(Input("checkpoint.resume", cfg.checkpoint.resume, Path(cfg.checkpoint.resume), ("**/*",)))
    modules = {"loss.name": cfg.loss.name, "rollout.reward": "" if cfg.rollout is None else cfg.rollout.reward}
    found += [Input(field, spec, _module_file(spec)) for field, spec in modules.items() if ":" in spec]
    return found


def _model_folder(path: str) -> Path | None:
    return cached_model(path) if HUB_MODEL.fullmatch(path) else Path(path)


def _module_file(spec: str) -> Path | None:
    """Return the file of a `module:function`."""
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(spec.partition(":")[0])
        if found is not None and found.origin is not None:
            return Path(found.origin)
    return None


def signature(inputs: list[Input]) -> str:
    """Return a hash of the host and the identity, size and time of all files: ranks with equal ones see the same."""
    told = hashlib.blake2b(socket.gethostname().encode(), digest_size=16)
    for each in inputs:
        told.update(f"\n{each.field} {each.path}".encode())
        for name, path in each.files().items():
            with suppress(OSError):
                status = path.stat()
                known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                told.update(f"\n{name} {known}".encode())
    return told.hexdigest()


def digests(each: Input, until: float) -> tuple[dict[str, str], str]:
    """Return ({file: its quick hash}, why it cannot be read or empty); files after `until` are left out."""
    if each.path is None:
        return {}, "not here"
    try:
        if each.path.is_dir():
            os.listdir(each.path)
        found: dict[str, str] = {}
        for name, path in each.files().items():
            if time.monotonic() > until and found:
                break
            found[name] = _digest(path)
        if not found:
            return {}, "no such file or directory" if not each.path.exists() else "no files in it"
    except OSError as error:
        return {}, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return found, ""


def _digest(path: Path) -> str:
    """Return size and hash of a file; of a large one only of its beginning, its end and blocks between them."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        told = hashlib.blake2b(str(size).encode(), digest_size=12)
        for start, length in _blocks(size):
            told.update(os.pread(file.fileno(), length, start))
    return f"{size}:{told.hexdigest()}"


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE_BYTES:
        yield 0, WHOLE_BYTES
        return
    for index in range(NUM_BLOCKS):
        yield (size - BLOCK_BYTES) * index // (NUM_BLOCKS - 1), BLOCK_BYTES


def settings_digest(cfg: JobConfig) -> str:
    """Return a hash of the resolved configuration, command line included."""
    return hashlib.blake2b(dump_config(cfg).encode(), digest_size=12).hexdigest()


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Return in words which files of one rank are not those of another: missing, more, or of other content."""
    found = [f"{name} is missing" for name in ours if name not in theirs]
    for name, digest in theirs.items():
        if name not in ours:
            found.append(f"{name} is only there")
        elif digest != ours[name]:
            size, other = digest.partition(":")[0], ours[name].partition(":")[0]
            found.append(f"{name} has {size} bytes, not {other}" if size != other else f"{name} has other content")
    return found
