"""Jobs with a loss of the user's own: trained, evaluated and resumed as any other, alone and under the launcher."""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from tests.support.tiny_jobs import (
    NOW,
    ROOT,
    metrics,
    numbers,
    records,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

MODULE = """
from megalign.losses import LossConfig, LossOut, Pairing, Traits, loss

class HingeConfig(LossConfig):
    margin: float = 1.0
    broken_after: int | None = None

    def traits(self):
        return Traits(Pairing("preference"), coupled=True, reference=True)

calls = 0

@loss(HingeConfig)
def hinge(scores, cfg):
    global calls
    calls += 1
    if cfg.broken_after is not None and calls > cfg.broken_after:
        raise KeyError("margin")
    ratio_S = scores.policy_S - scores.reference_S
    signed_S = ratio_S.where(scores.of_role("chosen"), -ratio_S)
    gap_G = signed_S.new_zeros(scores.num_groups).index_add(0, scores.group_S, signed_S)
    lost_G = (cfg.margin - gap_G).relu()
    return LossOut(lost_G.sum() / scores.num_groups, {"lost": (lost_G.detach() > 0).double().mean()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users_loss")
    write_model(folder / "model")
    write_lines(folder / "data.jsonl", records("pairs"))
    (folder / "hinge_loss.py").write_text(MODULE)
    return folder


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        eval={"path": str(folder / "data.jsonl"), "every": 2},
        loss={"name": "hinge_loss:hinge", "margin": 0.5},
    )


def test_a_job_trains_evaluates_and_resumes(config, tmp_path):
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    whole = metrics(tmp_path / "whole")
    assert any("eval_loss" in line and "eval_lost" in line for line in whole)
    assert all(line["lost"] >= 0 for line in whole if "lost" in line)
    written = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["loss"]
    assert written == {"name": "hinge_loss:hinge", "margin": 0.5, "broken_after": None}
    assert [train(config, NOW) for _ in range(3)] == [75, 75, 0]
    assert numbers(metrics(tmp_path / "run")) == numbers(whole)


def test_another_margin_is_another_job(config, tmp_path, capsys):
    assert train(config, NOW) == 75
    assert train(config, "loss.margin=0.75") == 2
    assert "loss.margin was 0.5, is 0.75" in capsys.readouterr().err


def test_what_a_loss_raises_ends_the_job_in_one_line(config, tmp_path, capsys):
    assert train(config, "loss.broken_after=0") == 2
    line = "loss 'hinge_loss:hinge' raised KeyError: 'margin' (hinge_loss.py line 18)"
    assert [told for told in capsys.readouterr().err.splitlines() if "error" in told] == [f"megalign: error: {line}"]
    assert status(tmp_path / "run")["code"] == 2


def test_two_tensor_ranks_under_the_launcher(config, folder, tmp_path):
    assert train(config, f"run.dir={tmp_path}/alone") == 0

    def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "launch/torchrun.sh"), "2", str(config), "parallel.tensor=2", *overrides],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=folder,  # where the loss is, which needs no PYTHONPATH then
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    done = launch()
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(tmp_path / "alone"), strict=True):
        for name, rel in {"loss": 1e-5, "grad_norm": 1e-4, "lost": 1e-5, "eval_loss": 1e-5}.items():
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=rel), name
    done = launch(f"run.dir={tmp_path}/fails", "loss.broken_after=0")
    assert done.returncode == 2, done.stderr
    assert "loss 'hinge_loss:hinge' raised KeyError: 'margin' (hinge_loss.py line 18)" in done.stderr
    assert "Traceback" not in done.stderr and "exitcode" not in done.stderr
