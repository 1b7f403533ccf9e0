"""What a user's loss or reward raises in the middle of a run ends it in a line with the records, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from megalign.rollout.prompts import Prompt, round_prompts
from tests.support.processes import on_two_ranks, run_ranks
from tests.support.tiny_jobs import (
    checkpoint_steps,
    metrics,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

MODULE = """
import torch
from megalign.losses import LossConfig, LossOut, Pairing, Traits, loss

class PickyConfig(LossConfig):
    def traits(self):
        return Traits(Pairing("samples"))

@loss(PickyConfig)
def picky(scores, cfg):
    if (scores.reward_S > 5).any():
        raise ValueError("too much of it")
    return LossOut((scores.reward_S * scores.policy_S).sum() / scores.num_sequences)

class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("no way back")

@loss(PickyConfig)
def backwards(scores, cfg):
    return LossOut(Backwards.apply(scores.policy_S.sum()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six records in three steps; the sixth has a reward that the loss refuses."""
    folder = tmp_path_factory.mktemp("users_errors")
    write_model(folder / "model", tokenizer=True)
    lines = json.loads(json.dumps(records("samples")[:6]))
    lines[5]["responses"][2]["reward"] = 9.0
    write_lines(folder / "data.jsonl", lines)
    (folder / "picky_loss.py").write_text(MODULE)
    return folder


@pytest.fixture
def config(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        data={
            "path": str(folder / "data.jsonl"),
            "groups_per_step": 2,
            "shuffle": False,
            "tokens_per_micro_batch": 16,
        },
        loss={"name": "picky_loss:picky"},
        checkpoint={"every": 1},
    )


def line_of(folder: Path) -> str:
    return f"{folder}/data.jsonl:6: loss 'picky_loss:picky' raised ValueError: too much of it (picky_loss.py line 12)"


def test_a_loss_that_raises_in_a_later_step(config, folder, tmp_path, capfd):
    assert train(config) == 1
    found = status(tmp_path / "run")
    assert (found["code"], found["step"]) == (1, 2)
    # Its micro-batch has a response of the record before it, too.
    assert found["reason"] == f"step 3: {folder}/data.jsonl:5, {line_of(folder)}"
    told = capfd.readouterr().err
    assert told.splitlines()[-1] == f"megalign: failed: {found['reason']}" and "Traceback" not in told
    assert len(metrics(tmp_path / "run")) == 2 and checkpoint_steps(tmp_path / "run")[-1] == 2


def test_a_loss_that_has_no_derivative(config, tmp_path):
    assert train(config, "loss.name=picky_loss:backwards") == 2  # in the first step
    reason = status(tmp_path / "run")["reason"]
    assert reason.endswith(
        ": loss 'picky_loss:backwards': its derivative raised ArithmeticError: no way back (picky_loss.py line 22)"
    )
    assert "/data.jsonl:1" in reason


def _main(folder: str, arguments: list[str]) -> None:
    import sys

    from megalign.__main__ import main

    sys.path.insert(0, folder)
    sys.exit(main(arguments))


def test_one_ranks_loss_ends_both(config, folder, tmp_path):
    """Only one rank's micro-batch has the record; the other waits for it in a collective, and for no time-out."""
    with pytest.raises(ProcessExitedException):
        run_ranks(_main, 2, str(folder), ["train", str(config)], timeout_s=120.0)
    told = status(tmp_path / "run")
    assert (told["code"], told["step"]) == (1, 2)
    assert told["reason"] in [f"step 3: rank {rank} of 2: {line_of(folder)}" for rank in range(2)]


def misbehave(prompt: str, response: str, record: dict) -> float:
    """Raise at one record; else reward lengths."""
    if record["bonus"]:
        raise LookupError("no such answer")
    return len(response) + len(set(response)) / 10


def test_a_reward_that_raises_in_a_later_round(folder, tmp_path):
    sections = round_sections(
        tmp_path, reward="tests.train.test_users_errors:misbehave", prompts_per_round=4, updates_per_round=1
    )
    plain = [Prompt(str(number), (), "", {}) for number in range(8)]
    later = int(round_prompts(plain, seed=0, round_number=1, prompts_per_round=4)[1].where)  # the second rank's
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"{at}+1=", "bonus": int(at == later)} for at in range(8)])
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    line = f"{tmp_path}/prompts.jsonl:{later + 1}: reward 'tests.train.test_users_errors:misbehave' raised LookupError"
    assert train(config, f"run.dir={tmp_path}/one") == 1
    told = on_two_ranks(tmp_path, [(["train", str(config), f"run.dir={tmp_path}/two"], 1)])
    assert told.count("megalign: failed: ") == 1 and "Traceback" not in told
    for run in ("one", "two"):
        found = status(tmp_path / run)
        assert (found["code"], found["step"]) == (1, 1)
        assert found["reason"].startswith(f"sampling round 2: {line}: no such answer"), found
