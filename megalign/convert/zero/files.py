"""Defines the file format of ZeRO's state: each rank's ranges of the flattened parameters, by name and position.

`index.json` lists the parameters, and the files that the ranks wrote. A file holds 1-D tensors `KIND/NAME@START`: the
values of parameter NAME, flattened, from START on. So any other partitioning reads the ranges that it needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.safetensors_file import DTYPES, NAMES, SafetensorsFile, Spec, plan_shards
from megalign.files import write_whole, writing
from megalign.schema import UserError

FORMAT = 1
FOLDER = "zero"  # in a checkpoint
INDEX = "index.json"
WEIGHT = "weight"
MAX_FILE_BYTES = 50_000_000_000


@dataclass(frozen=True, slots=True)
class Fragment:
    """Holds one rank's range of a flattened parameter: its values and those of the optimizer, by kind."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]  # 1-D, of one length

    @property
    def numel(self) -> int:
        """Return the number of values."""
        return next(iter(self.tensors.values())).numel()


@dataclass(frozen=True, slots=True)
class Index:
    """Describes what all files of a folder hold."""

    weights: Mapping[str, Spec]  # shape, and dtype in training; the files hold fp32
    kinds: tuple[str, ...]
    step: int  # of the optimizer
    world_size: int
    files: tuple[str, ...]
    source: str | None = None  # directory that held the rest of the model, on the machine of the run


def fragment_key(kind: str, name: str, start: int) -> str:
    """Return the name of a fragment's tensor in its file."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int] | None:
    """Return (kind, name, start); None where the key is not one of `fragment_key`."""
    kind, slash, rest = key.partition("/")
    name, at, start = rest.rpartition("@")
    return (kind, name, int(start)) if slash and at and name and start.isdecimal() else None


class PartWriter:
    """Writes one rank's tensors, named by `fragment_key`, one at a time to files of limited size, synced to disk."""

    def __init__(
        self, folder: Path, rank: int, specs: Mapping[str, Spec], *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self.folder = folder
        self.shards: dict[str, Mapping[str, Spec]] = {
            f"rank_{rank:05}_{number:03}.safetensors": shard
            for number, shard in enumerate(plan_shards(specs, max_file_bytes))
        }
        self.file_of = {key: file for file, shard in self.shards.items() for key in shard}
        self.files: dict[str, SafetensorsFile] = {}

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor; UserError where writing fails."""
        name = self.file_of[key]
        if name not in self.files:
            self.files[name] = SafetensorsFile(self.folder / name, self.shards[name])
        self.files[name].write(key, tensor)
        if not self.files[name].missing:
            self.files[name].close()

    def abandon(self) -> None:
        """Close the files that are not complete."""
        for file in self.files.values():
            if not file.closed:
                file.abandon()


def write_part(
    folder: Path, rank: int, fragments: Sequence[Fragment], *, max_file_bytes: int = MAX_FILE_BYTES
) -> list[str]:
    """Write one rank's fragments, synced to disk, and return the names of the files; UserError where writing fails."""
    tensors = {
        fragment_key(kind, fragment.name, fragment.start): tensor
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }
    specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    writer = PartWriter(folder, rank, specs, max_file_bytes=max_file_bytes)
    try:
        for key in writer.file_of:
            writer.write(key, tensors[key])
    finally:
        writer.abandon()
    return list(writer.shards)


def write_index(folder: Path, index: Index) -> None:
    """Write the index, after all ranks have written their parts; UserError where writing fails."""
    weights = {name: {"shape": spec.shape, "dtype": NAMES[spec.dtype]} for name, spec in index.weights.items()}
    content = {"format": FORMAT, **{key: value for key, value in asdict(index).items() if key != "weights"}}
    with writing(folder / INDEX):
        write_whole(folder / INDEX, json.dumps({**content, "weights": weights}, indent=1))


def read_index(folder: Path) -> Index:
    """Read the index; UserError where it is missing, damaged or of another version."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{path} is missing; must be the folder {FOLDER} of a checkpoint of engine deepspeed")
    plain = read_json(path)
    if plain.get("format") != FORMAT:
        raise UserError(
            f"{path}: format is {plain.get('format')!r}; must be {FORMAT}, which is what this version reads"
        )
    try:
        return _parsed(plain)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); must be as megalign wrote it") from None


def _parsed(plain: Mapping[str, Any]) -> Index:
    """Return the index; KeyError, TypeError or ValueError for values that are not of their kinds."""
    kinds = {"step": int, "world_size": int, "kinds": list, "weights": dict, "files": list}
    for key, kind in kinds.items():
        if not isinstance(plain[key], kind) or plain[key] is True:
            raise TypeError(f"{key} is {plain[key]!r}")
    if not isinstance(plain["source"], str | None):
        raise TypeError(f"source is {plain['source']!r}")
    texts = [*plain["kinds"], *plain["files"]]
    if not all(isinstance(text, str) and "/" not in text for text in texts) or WEIGHT not in plain["kinds"]:
        raise TypeError("kinds or files are not names")
    weights = {}
    for name, spec in plain["weights"].items():
        shape, dtype = tuple(spec["shape"]), DTYPES[spec["dtype"]]
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise TypeError(f"weights.{name}.shape is {spec['shape']!r}")
        weights[name] = Spec(shape, dtype)
    kinds_held, files = tuple(plain["kinds"]), tuple(plain["files"])
    return Index(weights, kinds_held, plain["step"], plain["world_size"], files, plain["source"])
