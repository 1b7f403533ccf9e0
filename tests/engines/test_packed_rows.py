"""Packed rows of transformers' models with megalign's attention against transformers' own, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megalign.engines.deepspeed.attention import NotPackable, PackedRows
from megalign.engines.deepspeed.packable import length_limit, packing_problem
from tests.support.tiny_transformers import ARCHITECTURES, assert_close, one_by_one, packed, random_row, tiny_model

PACKABLE = [name for name in ARCHITECTURES if name not in ("stablelm", "bert")]
LENGTHS = [5, 9, 1, 7, 7]

REFUSED = {
    "falcon": "does not go through transformers' attention interface",
    "gpt_neo": "does not go through transformers' attention interface",
    "bloom": "does not go through transformers' attention interface",
    "llama4_text": "of a kind that flash attention does not have",
    "deepseek_v32": "of a kind that flash attention does not have",
    "bart": "takes no position_ids",
    "jamba": "layers of type linear_attention",
    "qwen3_5_text": "layers of type linear_attention",
    "falcon_h1": "layers of type hybrid",
}


def model_class(model_type):
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


@pytest.mark.parametrize("model_type", PACKABLE)
def test_a_packed_row_computes_what_its_sequences_do_one_by_one(model_type):
    hidden, right = one_by_one(tiny_model(model_type, "eager"), LENGTHS)
    assert hidden.std() > 0.1
    mine, found = packed(tiny_model(model_type, PackedRows().name), LENGTHS)
    assert_close(mine, hidden, 1e-5)
    for name, gradient in found.items():
        assert_close(gradient, right[name], 1e-5, name)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_rows_without_borders_are_a_sequence_each(model_type):
    ids, *_ = random_row([7, 7, 7])
    rows = ids.view(3, 7)
    lengths = [7, 4, 1]  # padding behind
    real = torch.arange(7) < torch.tensor(lengths)[:, None]
    reference = tiny_model(model_type, "eager").base_model
    with torch.no_grad():
        mine = tiny_model(model_type, PackedRows().name).base_model(rows, attention_mask=real, use_cache=False)
        for hidden, row, length in zip(mine.last_hidden_state, rows, lengths, strict=True):
            right = reference(row[None, :length], use_cache=False).last_hidden_state[0]
            assert_close(hidden[:length], right, 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_recomputed_attention_changes_no_bit_and_keeps_less(model_type):
    kept = []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    answers = []
    for recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            answers.append(packed(tiny_model(model_type, PackedRows(recompute=recompute).name), LENGTHS))
    (hidden, right), (again, found) = answers
    assert torch.equal(again, hidden)
    for name, gradient in found.items():
        assert torch.equal(gradient, right[name]), name
    assert kept[1] < kept[0]


def test_layers_computed_again_in_backward_change_no_bit():
    (hidden, right), (again, found) = (
        packed(tiny_model("gpt_oss", PackedRows(recompute=True).name, layers_again=layers_again), LENGTHS)
        for layers_again in (False, True)
    )
    assert torch.equal(again, hidden)
    for name, gradient in found.items():
        assert torch.equal(gradient, right[name]), name


def test_a_model_that_drops_the_borders_is_found_out():
    with pytest.raises(NotPackable, match="was not given cu_seq_lens_q"):
        packed(tiny_model("stablelm", PackedRows().name), LENGTHS)


def test_attention_both_ways_is_refused():
    with pytest.raises(NotPackable, match="not a causal one"):
        packed(tiny_model("bert", PackedRows().name), LENGTHS)


def test_dropout_in_attention_is_refused():
    model = tiny_model("llama", PackedRows().name, attention_dropout=0.1).train()
    with pytest.raises(NotPackable, match=r"dropout is 0\.1: must be 0"):
        packed(model, LENGTHS)


@pytest.mark.parametrize("model_type", PACKABLE)
def test_what_can_be_packed_is_known_from_class_and_configuration(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    assert packing_problem(model_class(model_type), config) is None


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_packed_is_said(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    assert REFUSED[model_type] in packing_problem(model_class(model_type), config)


def test_frequencies_that_depend_on_a_row_have_a_limit():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    shape = {key: value for key, value in ARCHITECTURES["llama"].items() if key != "head_dim"}
    config = transformers.AutoConfig.for_model(
        "phi3", **shape, rope_parameters=rope, original_max_position_embeddings=32
    )
    assert length_limit(config) == 32
    assert length_limit(transformers.AutoConfig.for_model("gemma3_text")) is None
