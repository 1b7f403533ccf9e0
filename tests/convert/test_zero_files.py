"""Files of ZeRO's state: any range of any parameter from however many parts, and one line for each damage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.convert.zero.files import Fragment, parse_key, write_part
from megalign.convert.zero.source import ZeroSource
from megalign.schema import UserError
from tests.support.zero_checkpoints import KINDS, state_of, write_zero

VALUES = {
    "a.weight": torch.arange(35.0).reshape(5, 7),
    "a.bias": torch.arange(7.0).to(torch.bfloat16),
    "a.none": torch.zeros(0),
    "scale": torch.tensor(2.5),
    "b.weight": torch.randn(3, 11, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
}


@pytest.mark.parametrize("ranks", [1, 2, 5, 40])
@pytest.mark.parametrize("max_file_bytes", [10**9, 200])
def test_every_range_is_read(tmp_path, ranks, max_file_bytes):
    source = ZeroSource(write_zero(tmp_path / "zero", VALUES, ranks=ranks, max_file_bytes=max_file_bytes))
    assert (source.step, source.index.world_size) == (7, ranks)
    for name, kinds in state_of(VALUES).items():
        assert torch.equal(source.weight(name), VALUES[name]) and source.weight(name).dtype == VALUES[name].dtype
        for kind in KINDS:
            flat = kinds[kind]
            for start in range(len(flat)):
                for end in (start + 1, start + 4, len(flat)):
                    end = min(end, len(flat))
                    assert torch.equal(source.read(name, kind, start, end - start), flat[start:end])


def test_keys():
    assert parse_key("weight/model.layers.0.x@y@12") == ("weight", "model.layers.0.x@y", 12)
    assert [parse_key(key) for key in ("weight", "weight/a", "a@3", "weight/a@", "weight/@3", "weight/a@-1")] == [
        None
    ] * 6


def damaged(folder: Path, change) -> str:
    """The error after a change of a folder."""
    change(folder)
    with pytest.raises(UserError) as error:
        ZeroSource(folder)
    text = str(error.value)
    assert "\n" not in text
    return text.replace(f"{folder}", "ZERO")


def edit_index(**changes):
    def change(folder: Path) -> None:
        plain = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**plain, **changes}))

    return change


def edit_file(edit):
    def change(folder: Path) -> None:
        path = folder / "rank_00001_000.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def drop(tensors):
    del tensors["exp_avg/b.weight@0"]


def again(tensors):
    tensors["weight/a.weight@2"] = torch.zeros(3)


def too_long(tensors):
    tensors["weight/b.weight@0"] = torch.zeros(40)


def foreign(tensors):
    tensors["weight/c@0"] = torch.zeros(4)


def narrow(tensors):
    tensors["weight/b.weight@0"] = tensors["weight/b.weight@0"].half()


def cut(folder: Path) -> None:
    path = folder / "rank_00001_000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "ZERO/index.json is missing; must be the folder zero": lambda folder: (folder / "index.json").unlink(),
    "ZERO/index.json is not readable JSON": lambda folder: (folder / "index.json").write_text("{"),
    "ZERO/index.json: format is 2; must be 1": edit_index(format=2),
    "ZERO/index.json cannot be read (step is 'x')": edit_index(step="x"),
    "ZERO/index.json cannot be read (source is 3)": edit_index(source=3),
    "ZERO/index.json cannot be read (kinds or files are not names)": edit_index(files=["../x"]),
    "ZERO/index.json cannot be read ('F99')": edit_index(weights={"a": {"shape": [1], "dtype": "F99"}}),
    "ZERO/rank_00001_000.safetensors is missing": lambda folder: (folder / "rank_00001_000.safetensors").unlink(),
    "ZERO/rank_00001_000.safetensors is not a complete safetensors file": cut,
    "ZERO: index.json does not list rank_00001_000.safetensors": edit_index(files=["rank_00000_000.safetensors"]),
    "ZERO: values 0 to 32 of exp_avg b.weight are in no file": edit_file(drop),
    "ZERO: value 2 of weight a.weight is there twice": edit_file(again),
    "ZERO: values 33 to 39 of weight b.weight are more than it has": edit_file(too_long),
    "ZERO/rank_00001_000.safetensors: tensor weight/c@0 (F32 [4]) is none of the state": edit_file(foreign),
    "ZERO/rank_00001_000.safetensors: tensor weight/b.weight@0 (F16 [33]) is none": edit_file(narrow),
}


@pytest.mark.parametrize("text", DAMAGES)
def test_damage_is_one_line(tmp_path, text):
    assert damaged(write_zero(tmp_path / "zero", VALUES, ranks=2), DAMAGES[text]).startswith(text)


def test_a_disk_error_names_the_file(tmp_path):
    (tmp_path / "rank_00000_000.safetensors").mkdir()
    with pytest.raises(UserError, match=r"rank_00000_000.safetensors cannot be written: Is a directory"):
        write_part(tmp_path, 0, [Fragment("a", 0, {"weight": torch.zeros(3)})])


def test_nothing_is_lost(tmp_path):
    folder = write_zero(tmp_path / "zero", VALUES, ranks=4)
    held = sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values())
    assert held == len(KINDS) * sum(math.prod(value.shape) for value in VALUES.values())
