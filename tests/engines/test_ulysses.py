"""Parts of a packed row on several context ranks against the whole row in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalign.engines.deepspeed.attention import NotPackable, PackedRows
from megalign.engines.deepspeed.ulysses import context_problem
from megalign.runtime.distributed import process_group
from tests.support.processes import run_ranks
from tests.support.tiny_transformers import assert_close, gradients, packed, random_row, tiny_model

LENGTHS = [5, 9, 1, 7, 7, 7]  # 36 positions: a slot crosses every border between ranks
MODELS = ["llama", "gpt_oss", "gemma2", "deepseek_v3"]


def part(model, group):
    """Hidden states of this rank's part of the row, and the gradients of all ranks together."""
    ids, positions, borders, upstream = random_row(LENGTHS)
    ids, positions, upstream = (whole.chunk(group.size())[group.rank()] for whole in (ids, positions, upstream))
    out = model.base_model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, cu_seq_lens_q=borders
    ).last_hidden_state[0]
    out.backward(upstream)
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient, group=group)
    return out.detach(), found


def check_group(group, model_type, **changes):
    hidden, right = packed(tiny_model(model_type, PackedRows().name, **changes), LENGTHS)
    answers = [
        part(tiny_model(model_type, PackedRows(context=group, recompute=recompute).name, **again, **changes), group)
        for recompute, again in ((False, {}), (True, {}), (False, {"layers_again": True}))
    ]
    for mine, found in answers:
        assert_close(mine, hidden.chunk(group.size())[group.rank()], 1e-6, model_type)
        assert torch.equal(mine, answers[0][0])
        for name, gradient in found.items():
            assert_close(gradient, right[name], 1e-6, f"{model_type} {name}")
            assert torch.equal(gradient, answers[0][1][name]), name


def check_ranks():
    with process_group(timeout_s=60) as world:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        three = dist.new_group([0, 1, 2])
        for model_type in MODELS:
            check_group(pairs[world.rank // 2], model_type)
            check_group(dist.group.WORLD, model_type)
        if world.rank < 3:  # two key/value heads over three ranks: one has the queries of both
            check_group(three, "qwen3", num_attention_heads=6, num_key_value_heads=2, head_dim=4)
        without = tiny_model("llama", PackedRows(context=dist.group.WORLD).name)
        with pytest.raises(NotPackable, match="was not given cu_seq_lens_q"):
            without.base_model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)


def test_parts_of_a_row_compute_what_the_whole_does():
    run_ranks(check_ranks, 4)


def test_only_query_heads_must_be_divisible():
    assert context_problem(32, 8, 8) is None
    assert context_problem(32, 2, 8) is None
    assert context_problem(6, 2, 3) is None
    assert "12 attention heads cannot be split over 8 context ranks" in context_problem(12, 4, 8)
