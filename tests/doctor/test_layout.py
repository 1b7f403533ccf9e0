"""Where the ranks of a layout lie, how long stages wait, and what does not fit into memory."""

from __future__ import annotations

from typing import Any

import pytest

from megalign.config.job import load_config
from megalign.convert.hf.model import read_model
from megalign.doctor.layout import host_findings, memory_findings
from megalign.doctor.refusals import idle_finding
from tests.support.tiny_jobs import write_config, write_model

FOUR = ["a"] * 4 + ["b"] * 4


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    config = str(write_config(folder))
    return read_model(
        write_model(folder / "model", hidden_size=64, num_hidden_layers=8)
    ), lambda *overrides: load_config(config, overrides)


@pytest.mark.parametrize(
    ("hosts", "overrides", "found"),
    [
        (FOUR, ["parallel.tensor=4"], {}),
        (FOUR, ["parallel.tensor=8"], {"tensor groups": "all 8 ranks are one group on several hosts"}),
        (FOUR, ["parallel.pipeline=8"], {}),
        (["a", "b"] * 4, ["parallel.tensor=2"], {"tensor groups": "rank 0 on a, rank 1 on b"}),
        (FOUR, ["parallel.expert=8"], {"expert groups": "all 8 ranks are one group on several hosts"}),
        (FOUR, ["parallel.expert=4", "parallel.pipeline=2"], {}),
        (["a"] * 3 + ["b"] * 5, [], {"ranks a host": "unequal: 3 on a, 5 on b"}),
        (
            ["a"] * 3 + ["b"] * 5,
            ["parallel.tensor=2"],
            {"ranks a host": "unequal", "tensor groups": "rank 2 on a, rank 3 on b"},
        ),
    ],
)
def test_groups_on_several_hosts(job, hosts, overrides, found):
    told = {finding.check: finding for finding in host_findings(job[1](*overrides), hosts)}
    assert told.keys() == found.keys() and all(finding.state == "warn" for finding in told.values())
    for check, words in found.items():
        assert words in told[check].found


@pytest.mark.parametrize(
    ("overrides", "count", "state", "share"),
    [
        (["parallel.pipeline=4"], 4, "warn", "43%"),  # 3 of 4 + 3
        (["parallel.pipeline=4"], 8, "ok", "27%"),  # 3 of 8 + 3
        (["parallel.pipeline=4", "parallel.virtual_pipeline=2"], 4, "ok", "27%"),  # 1.5 of 4 + 1.5
    ],
)
def test_waiting_stages(job, overrides, count, state, share):
    finding = idle_finding(job[1](*overrides), count)
    assert finding.state == state and f"waits {share} of the time" in finding.found


def memories(kind: str, count: int, *, device: float = 0.0, host: float = 1e12) -> list[dict[str, Any]]:
    return [{"kind": kind, "device": device, "host": host}] * count


def test_memory_of_devices(job):
    model, cfg = job
    two = cfg("parallel.pipeline=2", "data.tokens_per_micro_batch=1000000")
    for device, state in ((100e9, "ok"), (17e9, "warn"), (2.5e9, "fail")):
        findings = memory_findings(two, model, ["a", "a"], memories("cuda", 2, device=device))
        assert {"ok", state} >= {finding.state for finding in findings} and findings[0].state == state, findings
    # The first stage keeps two micro-batches between their passes.
    assert findings[0].found.startswith("pipeline stage 0: ")


def test_a_checkpoint_needs_memory_of_the_host(job):
    model, cfg = job
    findings = memory_findings(cfg(), model, ["a"] * 4, memories("cuda", 4, device=80e9, host=4e9))
    assert [finding.state for finding in findings] == ["ok", "warn"]
    assert "a's 4 ranks: offloaded 0.0 kB, saving a checkpoint" in findings[1].found


def test_offloaded_state_is_the_hosts(job):
    model, cfg = job
    offload = ["engine.name=deepspeed", "engine.zero.offload_optimizer=true"]
    findings = memory_findings(cfg(*offload), model, ["a"], memories("cuda", 1, device=80e9, host=1e9 + 1000))
    assert [finding.state for finding in findings] == ["ok", "fail"]
