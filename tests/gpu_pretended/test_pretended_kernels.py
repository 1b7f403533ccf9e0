"""Single operations on a CUDA device that is not there, with the checks of CUDA's kernels."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalign.models import flash
from tests.gpu_pretended.kernel_checks import CHECKS

ROOT = Path(__file__).resolve().parents[2]

# Arguments of torch's flash operator that a call may name, by version of torch.
NAMED = {
    "2.8": {"scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes"},
    "2.10": {"scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes"},
    "2.13": {
        "scale",
        "window_size_left",
        "window_size_right",
        "seqused_k",
        "alibi_slopes",
        "block_table",
        "num_splits",
    },
}


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What each check found wrong."""
    command = [sys.executable, "-m", "tests.gpu_pretended.kernel_checks", *CHECKS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_an_operation_on_the_device(problems: dict[str, str], name: str) -> None:
    assert not problems[name], problems[name]


@pytest.mark.parametrize("version", NAMED)
def test_attention_calls_what_every_version_of_torch_has(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """torch's public function for it differs from version to version in what it takes."""

    def operator(query, key, value, cum_q, cum_k, max_q, max_k, dropout, is_causal, return_mask, **named):  # type: ignore[no-untyped-def]
        assert set(named) <= NAMED[version]
        assert key.shape[1] == 1  # heads of keys are not repeated
        return query, query.new_zeros(query.shape[1], len(query)), torch.zeros(2), torch.zeros(0), torch.zeros(0)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    borders = torch.tensor([0, 2, 5], dtype=torch.int32)
    query, key = torch.randn(5, 4, 12), torch.randn(5, 1, 12)
    for sinks in (None, torch.zeros(4)):
        out = flash.flash(
            query, key, key, flash.Sequences((borders, borders), (3, 3)), scale=None, window=2, sinks_N=sinks
        )
        assert out.shape == (5, 4, 12)


def test_the_flash_operator_here_is_the_newest_that_is_known() -> None:
    """A torch whose operator has other names fails here, not on a GPU."""
    arguments = {
        each.name for each in torch.ops.aten._flash_attention_forward.default._schema.arguments if each.kwarg_only
    }
    assert arguments >= NAMED["2.8"]
    assert "window_size_left" in inspect.getsource(flash)
