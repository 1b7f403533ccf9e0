"""A whole model on one process: hidden states equal those of transformers, alone or packed with others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from megalign.config.layout import Layout, split_layers
from megalign.convert import read_model_config
from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import pack
from megalign.engines.megatron.engine import MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.models.gpt import choose_layers, te_import_problem
from megalign.models.rope import frequencies
from megalign.models.slots import Slots
from megalign.runtime.distributed import process_group

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Each turns on something that the others do not have.
MODELS = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "attention_bias": True},
    "mistral": {"sliding_window": 4, "head_dim": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 10},
}


def save_random(model_type: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny model with every parameter random, norms and biases too, saved in fp32."""
    sizes = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **(sizes | MODELS[model_type]))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_hidden_states_equal_those_of_transformers_one_by_one(model_type, tmp_path):
    reference = save_random(model_type, tmp_path)
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(37, (length,), generator=random).tolist() for length in (9, 3, 9, 200)]
    sequences = [
        TokenSequence(place, place, "response", tuple(one[:2]), Response(tuple(one[2:])))
        for place, one in enumerate(ids)
    ]
    with process_group(timeout_s=60) as world, torch.no_grad():
        engine = MegatronEngine(
            read_model_config(tmp_path),
            make_groups(Layout(), timeout_s=60),
            EngineOptions(torch.float32, world.device),
            adamw=None,
        )
        engine.load_weights(tmp_path)
        for members, pad_rows in (((0, 1, 2, 3), False), ((1, 0), True), ((3,), False)):
            batch = pack(sequences, members, pad_rows=pad_rows)
            slots = Slots(batch.cu_seqlens, batch.token_T.device)
            hidden_T1H = engine.shard.chunks[0](batch.token_T, batch.position_T, batch.length_T, slots)
            for slot, member in enumerate(members):
                first = int(batch.cu_seqlens[slot])
                mine = hidden_T1H[first : first + len(ids[member]), 0]
                theirs = reference.model(torch.tensor([ids[member]])).last_hidden_state[0]
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_frequencies_equal_those_of_transformers(tmp_path):
    reference = save_random("llama", tmp_path)
    mine = frequencies(read_model_config(tmp_path).rope)
    torch.testing.assert_close(mine, reference.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    plain = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    assert not torch.allclose(mine, plain), "the scaling did nothing"


def test_layers_are_torch_where_there_is_no_cuda(tmp_path):
    save_random("llama", tmp_path)
    model = read_model_config(tmp_path)
    job = {"dtype": torch.bfloat16, "context_size": 1}
    assert choose_layers("auto", model, on_cuda=False, **job) == "torch"
    assert choose_layers("transformer_engine", model, on_cuda=False, **job) == "transformer_engine"


@pytest.mark.parametrize(
    ("changes", "job", "wanted"),
    [
        ({}, {}, "transformer_engine"),
        ({"sinks": True}, {}, "torch"),
        ({}, {"dtype": torch.float32}, "torch"),  # it would multiply in TF32
        ({"sliding_window": 8}, {"context_size": 2}, "torch"),
        ({"sliding_window": 8}, {}, "transformer_engine"),
    ],
)
def test_transformer_engine_is_chosen_for_what_it_computes(tmp_path, monkeypatch, changes, job, wanted):
    save_random("qwen3", tmp_path)
    model = replace(read_model_config(tmp_path), **changes)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    assert choose_layers("auto", model, on_cuda=True, **{"dtype": torch.bfloat16, "context_size": 1, **job}) == wanted


def test_a_transformer_engine_that_does_not_import_counts_as_absent(tmp_path, monkeypatch):
    save_random("qwen3", tmp_path)
    model = read_model_config(tmp_path)
    broken = tmp_path / "broken" / "transformer_engine"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "pytorch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(broken.parent))
    assert choose_layers("auto", model, on_cuda=True, dtype=torch.bfloat16, context_size=1) == "torch"
    assert te_import_problem() == "libcudart.so.13: cannot open shared object file"
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "layers, stages, split",
    [
        (4, 2, [2, 2]),
        (5, 2, [3, 2]),  # the last has the head
        (5, 4, [1, 2, 1, 1]),  # the first has the embedding
        (7, 4, [2, 2, 2, 1]),
        (61, 16, [3, *[4] * 13, 3, 3]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_are_split_evenly_with_fewer_at_the_ends(layers, stages, split):
    found = split_layers(layers, stages)
    assert sum(found) == layers and max(found) - min(found) <= 1
    assert found[-1] == min(found)
    assert found == split
