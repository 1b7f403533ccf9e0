"""The groups that the doctor measures are Megatron's, and slow ones are told from the rest."""

from __future__ import annotations

import pytest
import torch
from megatron.core.parallel_state import RankGenerator

from megalign.config.layout import Layout
from megalign.doctor.network import EXPECTED, OPERATIONS, Axis, axes, judge_network
from megalign.doctor.visit import Visit
from megalign.runtime.distributed import World

LAYOUTS = [
    (Layout(), 4),
    (Layout(tensor=2), 8),
    (Layout(pipeline=4), 8),
    (Layout(tensor=2, context=2, pipeline=2), 16),
    (Layout(tensor=2, pipeline=2, expert=4, sequence=True), 16),
    (Layout(context=2, expert=2), 8),
    (Layout(tensor=4, pipeline=2, context=2, expert=8, sequence=True), 64),
]


@pytest.mark.parametrize(("layout", "size"), LAYOUTS, ids=lambda each: str(each))
def test_groups_are_those_of_megatron(layout, size):
    found = {axis.name: [list(ranks) for ranks in axis.groups] for axis in axes(layout, size)}
    inner = layout.tensor * layout.context * layout.pipeline
    dense = RankGenerator(layout.tensor, 1, size // inner, layout.pipeline, layout.context, "tp-cp-ep-dp-pp")
    expert_data = size // layout.pipeline // layout.expert
    experts = RankGenerator(1, layout.expert, expert_data, layout.pipeline, 1, "tp-cp-ep-dp-pp")
    named = {"tensor": (dense, "tp"), "context": (dense, "cp"), "data": (dense, "dp"), "pipeline": (dense, "pp")}
    named |= {"expert": (experts, "ep")} | ({"expert data": (experts, "dp")} if layout.expert > 1 else {})
    for name, (generator, token) in named.items():
        wanted = [list(ranks) for ranks in generator.get_ranks(token)]
        assert sorted(found.get(name, [])) == (sorted(wanted) if len(wanted[0]) > 1 else []), name


def visit_of(hosts: list[str]) -> Visit:
    return Visit(World(0, len(hosts), torch.device("cpu")), None, hosts=hosts)


def test_slow_groups_are_named():
    axis = Axis("data", ((0, 1), (2, 3), (4, 5), (6, 7)))
    fine = {operation: [1.0, 100.0] for operation in OPERATIONS}
    within, between = EXPECTED["gloo", False], EXPECTED["gloo", True]
    one_host = visit_of(["a"] * 8)
    (finding,) = judge_network(one_host, axis, [fine] * 8)
    assert finding.state == "ok" and finding.found.startswith("4 groups of 2 (gloo), the slowest: all-reduce 1.00 GB/s")

    def told(visit, rank, operation, measured):
        answers = [fine | {operation: measured} if each == rank else fine for each in range(8)]
        return [(finding.state, finding.found) for finding in judge_network(visit, axis, answers)]

    ((state, text),) = told(one_host, 5, "all-to-all", [0.4, 100.0])
    assert state == "warn" and text == (
        "within a machine: all-to-all 0.40 GB/s, other groups 1.00 (slowest: ranks 4-5 on a)"
    )
    ((state, text),) = told(one_host, 2, "all-reduce", [within[0] / 2, 100.0])
    assert state == "warn" and text.endswith("GB/s, expected 0.02 (slowest: ranks 2-3 on a)")
    ((state, text),) = told(one_host, 2, "all-reduce", [within[0] / 11, 100.0])
    assert state == "fail"
    two_hosts = visit_of(["a"] * 3 + ["b"] * 5)  # only ranks 2 and 3 span the hosts
    ((state, text),) = told(two_hosts, 3, "point to point", [1.0, between[1] * 2])
    assert (
        state == "warn"
        and text.startswith("between machines: ")
        and "takes 40000 us" in text
        and "rank 2 on a, rank 3 on b" in text
    )
    ((state, text),) = told(two_hosts, 3, "point to point", [1.0, between[1] * 20])
    assert state == "fail"

    part = {operation: fine[operation] for operation in list(OPERATIONS)[:2]}
    last = judge_network(one_host, axis, [fine] * 6 + [part] * 2)[-1]
    wanted = "the time did not suffice to measure reduce-scatter, all-to-all, point to point"
    assert (last.state, last.found) == ("warn", wanted)
    slow = {operation: [within[0] / 2, 100.0] for operation in OPERATIONS}
    (finding,) = judge_network(one_host, axis, [fine] * 2 + [slow] * 2 + [fine] * 4)
    assert finding.found.count("expected") == 5 and finding.found.endswith("(slowest: ranks 2-3 on a)")
