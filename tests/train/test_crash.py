"""Five of the kills of benchmarks/crash.py: a job restarts itself and ends as if nothing had happened."""

from __future__ import annotations

import random

import pytest

from tests.support.crash import PHASES, compare, crash, start, write_job


@pytest.mark.slow
def test_a_job_whose_ranks_are_killed_ends_as_one_that_was_left_alone(tmp_path):
    config = write_job(tmp_path, **{"async": True})
    assert start(config, tmp_path / "plain", restarts=0).wait(200) == 0
    result = crash(config, tmp_path / "killed", PHASES, random.Random(7))
    assert result.problems == [] and result.code == 0, result
    assert len(result.kills) == len(PHASES)
    assert compare(tmp_path / "killed", tmp_path / "plain") == []
