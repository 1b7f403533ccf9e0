"""Check which layouts work, rule by rule, and that the suggested layouts work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalign.config.layout import Layout, nearest, problem, refusal
from megalign.model_config import ModelConfig, MoeConfig, Rope

DENSE = ModelConfig("llama", 6, 64, 96, 8, 4, 8, 131, 512, 1e-5, Rope(1e4, 8))
MOE = replace(DENSE, family="qwen2_moe", moe=MoeConfig(6, 2, 40, shared_ffn_size=24, dense_layers=(0,)))
ALL_EXPERTS = replace(DENSE, family="mixtral", ffn_size=97, moe=MoeConfig(4, 2, 97))

REFUSED = [
    (
        DENSE,
        6,
        Layout(tensor=4),
        "x parallel.context is 4 x 1 x 1 = 4: must divide the number of ranks 6, so be one of",
    ),
    (
        DENSE,
        8,
        Layout(tensor=8),
        "parallel.tensor is 8: must divide the model's key-value heads 4; values that fit this",
    ),
    (
        replace(DENSE, ffn_size=98),
        4,
        Layout(tensor=4),
        "the model's feed-forward size 98; values that fit this model: 1, 2",
    ),
    (replace(MOE, moe=MoeConfig(6, 2, 40, shared_ffn_size=26)), 4, Layout(tensor=4, sequence=True), "expert's size 26"),
    (DENSE, 2, Layout(sequence=True), "parallel.sequence is true: it splits over tensor ranks"),
    (DENSE, 7, Layout(pipeline=7), "parallel.pipeline is 7: must be at most the model's layers 6"),
    (DENSE, 2, Layout(pipeline=2, virtual_pipeline=4), "parallel.virtual_pipeline is 8: must be at most the model's"),
    (DENSE, 2, Layout(virtual_pipeline=2), "parallel.virtual_pipeline is 2: it interleaves pipeline stages"),
    (DENSE, 2, Layout(expert=2), "parallel.expert is 2: the model has no experts; must be 1"),
    (MOE, 8, Layout(expert=4), "parallel.expert is 4: must divide the model's experts 6 and the ranks of a stage 8"),
    (MOE, 4, Layout(pipeline=2, expert=3), "experts 6 and the ranks of a stage 2; values that fit: 1, 2"),
    (MOE, 2, Layout(tensor=2), "parallel.sequence is false: with experts and parallel.tensor 2 it must be true"),
]
WORKING = [
    (DENSE, 8, Layout(tensor=4, context=2, sequence=True)),
    (DENSE, 4, Layout(pipeline=4)),  # six layers on four stages
    (DENSE, 4, Layout(pipeline=2, virtual_pipeline=3, context=2)),
    (MOE, 4, Layout(tensor=2, sequence=True, expert=2)),
    (MOE, 6, Layout(pipeline=2, expert=3)),
    (ALL_EXPERTS, 4, Layout(tensor=4, sequence=True, expert=4)),  # an expert's own size is never split
]


@pytest.mark.parametrize("model, world, layout, words", REFUSED)
def test_a_layout_that_cannot_work_is_refused_by_its_own_rule(model, world, layout, words):
    assert words in problem(layout, model, world)


@pytest.mark.parametrize("model, world, layout", WORKING)
def test_a_layout_that_works_is_not(model, world, layout):
    assert problem(layout, model, world) is None and refusal(layout, model, world) is None
    assert nearest(layout, model, world, count=1) == [layout]


def test_a_model_that_is_only_scored_need_not_have_experts():
    assert problem(Layout(expert=2), DENSE, 2, trained=False) is None


@pytest.mark.parametrize("model", [DENSE, MOE, ALL_EXPERTS])
@pytest.mark.parametrize("world", range(1, 17))
def test_what_is_offered_instead_works(model, world):
    for layout in (Layout(), Layout(tensor=8), Layout(pipeline=9, virtual_pipeline=2), Layout(3, 2, 1, 5, 7, True)):
        offered = nearest(layout, model, world)
        assert offered and len(set(offered)) == len(offered)
        assert [problem(other, model, world) for other in offered] == [None] * len(offered)


def test_the_line_names_what_is_near():
    assert refusal(Layout(tensor=8), DENSE, 8) == (
        "parallel.tensor is 8: must divide the model's key-value heads 4; values that fit this model: 1, 2, 4; "
        "nearest layouts of 8 ranks for this model: tensor 4, data 2; tensor 4, data 2, sequence; tensor 2, data 4"
    )
