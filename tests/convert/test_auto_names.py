"""The tensors of any model of transformers: from a checkpoint to the module and back, by transformers' own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from megalign.convert.hf.auto_model import auto_config, meta_model
from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.auto_source import AutoSource, check_auto_weights
from megalign.convert.hf.model import read_model
from megalign.convert.hf.weight_files import SINGLE
from megalign.convert.hf.writer import model_specs, specs_of
from tests.support.auto_checkpoints import AUTO_CASES, write_auto_checkpoint
from tests.support.families import FAMILY_CASES, PLAIN_CASES, write_family


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each case once, as a read-only directory."""
    root = tmp_path_factory.mktemp("auto")
    return {name: write_auto_checkpoint(root / name, name) for name in AUTO_CASES}


def opened(folder: Path) -> AutoSource:
    return AutoSource(read_model(folder), AutoNames(meta_model(folder)))


def loaded(folder: Path) -> nn.Module:
    """A model on the CPU, filled from a checkpoint group by group."""
    model = transformers.AutoModelForCausalLM.from_config(auto_config(folder), dtype=torch.float32)
    state = model.state_dict()
    source = opened(folder)
    filled = {name: state[name].copy_(value) for name, value in source}
    assert set(filled) == set(source.names.tensors) and not source.absent
    source.close()
    return model.eval()


@pytest.mark.parametrize("name", AUTO_CASES)
def test_there_and_back(written, name):
    source, stored = opened(written[name]), load_file(written[name] / SINGLE)
    names, back = source.names, {}
    module = {key: value for group in source.groups for key, value in source.read(group).items()}
    assert {key: tuple(value.shape) for key, value in module.items()} == {
        key: tuple(value.shape) for key, value in names.tensors.items()
    }
    for group in names.groups:
        made = names.to_checkpoint({key: module[key] for key in group.module})
        assert tuple(made) == group.stored
        back |= made
    assert set(back) == set(stored)
    assert all(torch.equal(back[key], stored[key]) for key in stored)
    assert {key: (spec.shape, spec.dtype) for key, spec in names.specs.items()} == {
        key: (tuple(value.shape), value.dtype) for key, value in stored.items()
    }


@pytest.mark.parametrize("name", AUTO_CASES)
def test_the_model_computes_what_transformers_does(written, name):
    ids = torch.tensor([[3, 130, 7, 7, 64, 12, 99, 5, 31, 8, 2]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written[name]).eval()
    for parameter in theirs.parameters():  # out of the mapped file: last bits of products depend on the alignment
        parameter.data = parameter.data.clone()
    wanted = theirs(ids).logits
    probs = wanted.softmax(-1)
    assert probs.max() > 4 / 131  # far from uniform
    assert torch.equal(loaded(written[name])(ids).logits, wanted)


@pytest.mark.parametrize("case", [*FAMILY_CASES, *PLAIN_CASES])
def test_transformers_names_are_those_of_our_tables(tmp_path, case):
    folder = write_family(tmp_path / case, case)
    model = read_model(folder)
    for dtype in (torch.float32, torch.bfloat16):
        ours = model_specs(model.known(), dtype)
        assert AutoNames(meta_model(folder, dtype=dtype)).specs == ours
        assert specs_of(model, dtype) == ours
    assert set(check_auto_weights(model)) == set(load_file(folder / SINGLE))


def test_noise_is_off(written):
    for name, asked in (("gpt2", "attn_pdrop"), ("phimoe", "input_jitter_noise"), ("dbrx", "moe_jitter_eps")):
        assert asked in (written[name] / "config.json").read_text()
        model = meta_model(written[name])
        values = [getattr(place, asked) for place in (model.config, *model.modules()) if hasattr(place, asked)]
        inner = getattr(model.config, "ffn_config", None)
        values += [getattr(inner, asked)] if hasattr(inner, asked) else []
        assert values and not any(values), name
        assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
        assert model.config.use_cache is False
    folder = write_auto_checkpoint(written["opt"].parent / "padded", "opt", pad_token_id=1)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 1
    assert meta_model(folder).get_input_embeddings().padding_idx is None
