"""Ten drawn steps in drawn layouts; benchmarks/random_layouts.py takes as many as it is told."""

import json

import pytest

from tests.support.processes import run_ranks
from tests.support.random_cases import draw_cases, failure, run_world, write_case

COUNT, SEED, SIZES = 10, 5, (2, 4)


@pytest.fixture(scope="module")
def cases():
    return draw_cases(COUNT, number=SEED, sizes=SIZES)


@pytest.fixture(scope="module")
def found(cases, tmp_path_factory):
    """(what the engine gave, the answer) of each case; one launch a number of ranks."""
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(len(cases)):
        (folder / str(number)).mkdir()
    answers = [write_case(case, folder / str(number)) for number, case in enumerate(cases)]
    for ranks in SIZES:
        run_ranks(
            run_world, ranks, folder, [(number, case) for number, case in enumerate(cases) if case.ranks == ranks]
        )
    return [(json.loads((folder / str(number) / "found.json").read_text()), one) for number, one in enumerate(answers)]


@pytest.mark.parametrize("number", range(COUNT))
def test_a_drawn_step_is_right(found, cases, number):
    assert failure(*found[number]) is None, str(cases[number])


def test_drawn_cases_differ_and_repeat(cases):
    assert draw_cases(COUNT, number=SEED, sizes=SIZES) == cases
    assert len({case.layout for case in cases}) > 4 and len({case.loss for case in cases}) > 3


def test_failures_are_told():
    right = {"loss": 0.5, "norm": 2.0, "terms": 3.0}
    assert failure({"loss": 0.50002, "norm": 2.0001}, right) is None
    assert "loss 0.50004" in failure({"loss": 0.50004, "norm": 2.0}, right)
    assert "norm 2.001" in failure({"loss": 0.5, "norm": 2.001}, right)
    assert "loss nan" in failure({"loss": float("nan"), "norm": 2.0}, right)
