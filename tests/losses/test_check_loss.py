"""check-loss: every built-in loss passes, and each check fails for a loss that is wrong in its way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megalign.__main__ import main
from megalign.losses import LOSSES, choose_loss
from megalign.losses.base import RESERVED
from megalign.losses.check import CHECKS, check_loss
from tests.train.test_train import STEP_KEYS

SETTINGS = [
    *[{"name": name} for name in LOSSES],
    {"name": "dpo", "variant": "ipo"},
    {"name": "epa", "weak": 0, "strong": 3},
    {"name": "grpo", "beta": 0.3},
    {"name": "grpo", "variant": "dapo"},
    {"name": "grpo", "variant": "dr_grpo", "max_response_length": 9},
    {"name": "rloo", "beta": 0.0},
    {"name": "tests.support.my_losses:margin"},
    {"name": "tests.support.my_losses:focal"},
]


@pytest.mark.parametrize("raw", SETTINGS, ids=lambda raw: " ".join(map(str, raw.values())))
def test_right_losses_pass(raw):
    assert [result for result in check_loss(choose_loss(raw)) if result.problem] == []


HEAD = """
import torch
from megalign.losses import LossConfig, LossOut, Pairing, Traits, loss

def config(kind, **traits):
    class Config(LossConfig):
        scale: float = 1.0
        mode: str = "plain"

        def traits(self):
            return Traits(Pairing(kind), **traits)

    return Config
"""
# name: (traits, the body of the loss, the check that fails, a part of what it says)
WRONG = {
    "undeclared reference": (
        "'single'", "LossOut((s.policy_S - s.reference_S).sum() / s.num_tokens)", "runs",
        "raised TypeError: unsupported operand type(s)",
    ),
    "undeclared old": (
        "'samples', reference=True", "LossOut((s.policy_S - s.old_S).sum() / s.num_tokens)", "runs",
        "fields that its traits() leave None: old, teacher",
    ),
    "no gradient": ("'single'", "LossOut(s.policy_S.detach().sum() / s.num_tokens)", "runs", "is zero; must come from"),
    "sum of a token loss": (
        "'single', level='token'", "LossOut(s.policy_S.sum() / s.num_tokens)", "runs", "must come from policy_T",
    ),
    "not a loss": ("'single'", "s.policy_S.sum()", "runs", "must be LossOut"),
    "logarithm": ("'single'", "LossOut(s.policy_S.log().sum() / s.num_tokens)", "runs", "is not finite"),
    "half detached": (
        "'single'", "LossOut((s.policy_S * s.policy_S.detach()).sum() / s.num_tokens)", "gradient", "look for detach()",
    ),
    "single precision": (
        "'single'", "LossOut((s.policy_S.float() * 1e3).sin().sum().double() / s.num_tokens)", "gradient",
        "a sum below float64",
    ),
    "tokens summed in fp32": (
        "'single', level='token'", "LossOut(-s.policy_T.sum() / s.num_tokens)", "precision", "must be float64",
    ),
    "mean of the part": ("'single'", "LossOut(-s.policy_S.mean())", "parts", "never mean() or len()"),
    "own count": (
        "'single', level='token'", "LossOut(-s.policy_T.double().sum() / len(s.policy_T))", "parts", "sum, then divide",
    ),
    "undeclared coupling": (
        "'samples'", "LossOut(s.policy_S.sum().square() / s.num_groups)", "parts", "needs coupled=True or `prepare`",
    ),
    "first response": (
        "'samples', coupled=True",
        "LossOut((s.policy_S * (s.group_S.diff(prepend=s.group_S[:1] * 0 - 1) != 0)).sum() / s.num_groups)", "order",
        "must not matter",
    ),
    "group number": ("'single'", "LossOut((s.policy_S * s.group_S).sum() / s.num_groups)", "order", "use group_S and"),
    "in place": (
        "'samples'", "LossOut((s.policy_S * s.reward_S.mul_(0.5)).sum() / s.num_groups)", "inputs",
        "it writes into scores.reward_S",
    ),
    "in place on a policy": (
        "'single'", "LossOut(s.policy_S.sub_(1.0).sum() / s.num_groups)", "runs", "raised RuntimeError",
    ),
    "metric of a taken name": (
        "'single'", "LossOut(-s.policy_S.sum() / s.num_tokens, {'lr': s.policy_S.detach().mean()})", "runs",
        "returned the metric 'lr'; must be a word that no step reports",
    ),
    "metric with a gradient": (
        "'single'", "LossOut(-s.policy_S.sum() / s.num_tokens, {'a': s.policy_S.mean()})", "metrics",
        "must be detached",
    ),
    "metric that is no number": (
        "'single'", "LossOut(-s.policy_S.sum() / s.num_tokens, {'a': s.policy_S.detach().log().mean()})", "metrics",
        "a is nan; must be finite, or left out",
    ),
    "undeclared metric": (
        "'single', level='token'", "LossOut(-s.policy_T.sum() / s.num_tokens, {'a': s.policy_T.detach().sum() * 0})",
        "metrics", "the metrics are ['a'], token_metrics of the traits []; must be the same",
    ),
    "declared metric that does not come": (
        "'single', level='token', token_metrics=('b',)", "LossOut(-s.policy_T.sum() / s.num_tokens)",
        "metrics", "the metrics are [], token_metrics of the traits ['b']",
    ),
    "metric of some parts": (
        "'single', level='token', token_metrics=('a',)",
        "LossOut(-s.policy_T.sum() / s.num_tokens, {'a': s.policy_T.detach().sum() * 0} if len(s.length_S) else {})",
        "metrics", "a part has the metrics [], the whole ['a']",
    ),
    "metric that is a mean": (
        "'single', level='token', token_metrics=('a',)",
        "LossOut(-s.policy_T.sum() / s.num_tokens, {'a': s.policy_T.detach().sum() / (1 + len(s.policy_T))})",
        "metrics", "must add up",
    ),
    "largest of a part": ("'single'", "LossOut(-(s.policy_S / s.policy_S.abs().max() * 0 + s.policy_S).sum() / 9)",
                          "empty", "raised RuntimeError"),
    "constant": ("'single'", "LossOut(-(s.policy_S.sum() + 1e-15) / s.num_tokens)", "empty", "must be 0"),
    "deviation": (
        "'samples', coupled=True",
        "LossOut((s.policy_S * s.reward_S / (s.reward_S - s.reward_S[0]).abs().max()).sum() / s.num_groups)", "rewards",
        "guard divisions",
    ),
    "log of sigmoid": (
        "'single', reference=True",
        "LossOut(-(s.policy_S - s.reference_S).sigmoid().log().sum() / s.num_groups)", "far", "use logsigmoid",
    ),
    "not linear": (
        "'single', linear=True", "LossOut(s.policy_S.square().sum() / s.num_tokens)", "linear",
        "must be, or linear left",
    ),
    "linear and more": (
        "'single', level='token', linear=True",
        "LossOut((-s.policy_T.sum() + len(s.policy_T)) / s.num_tokens)", "linear", "must be, or linear left out",
    ),
}  # fmt: skip
PREPARED = {
    "a number for all": ("s.reward_S.mean()", "runs", "must be a tensor of one number a sequence"),
    "a list": ("s.reward_S.tolist()", "runs", "must be a tensor of one number a sequence"),
    "single precision": ("s.reward_S.float()", "prepare", "prepare gives torch.float32; must be float64"),
    "of the policy": ("s.policy_S * s.reward_S", "prepare", "prepare looks at the policy's log-probs"),
}


@pytest.fixture
def users(tmp_path, monkeypatch, request):
    """Write a module of one loss; gives the results of its checks as {check: problem}."""
    monkeypatch.syspath_prepend(tmp_path)

    def check(traits: str, body: str, prepare: str | None = None) -> dict[str, str]:
        name = f"wrong_{abs(hash((traits, body, prepare)))}"
        decorator = f"loss(config({traits})" + (", prepare=prepare)" if prepare else ")")
        functions = f"def prepare(s, cfg):\n    return {prepare}\n\n@{decorator}\ndef f(s, cfg):\n    return {body}\n"
        (tmp_path / f"{name}.py").write_text(HEAD + functions)
        return {result.name: result.problem for result in check_loss(choose_loss({"name": f"{name}:f"}))}

    return check


@pytest.mark.parametrize("case", WRONG)
def test_wrong_losses_fail_their_check(case, users):
    traits, body, check, says = WRONG[case]
    problems = users(traits, body)
    assert says in problems[check], problems


@pytest.mark.parametrize("case", PREPARED)
def test_wrong_advantages(case, users):
    prepare, check, says = PREPARED[case]
    problems = users("'samples'", "LossOut(s.policy_S.sum() / s.num_tokens)", prepare)
    assert says in problems[check], problems


def test_advantages_that_the_function_cannot_make(users):
    body = "LossOut((s.policy_S * (1 if s.advantage_S is None else s.advantage_S)).sum() / s.num_groups)"
    problems = users("'samples', old=True, old_in_advantages=True", body, "s.reward_S - s.old_S")
    assert "must make the advantages itself then" in problems["prepare"]


def test_every_check_is_seen_to_fail():
    assert {check for _, _, check, _ in WRONG.values()} | {"prepare"} == set(CHECKS)


def test_metrics_may_not_be_named_as_what_a_step_reports():
    assert set(RESERVED) >= STEP_KEYS | {"round", "entropy", "token_accuracy", "aux_loss"}


def test_the_command(capsys):
    assert main(["check-loss", "tests.support.my_losses:margin", "margin=0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loss tests.support.my_losses:margin with margin=0.3"
    assert lines[-1] == "all 10 checks passed" and all(line.startswith("ok") for line in lines[1:-1])
    assert main(["check-loss", "orpo", "loss.lambda=0.5"]) == 0
    assert capsys.readouterr().out.startswith("loss orpo with lambda=0.5\n")


def test_the_command_says_what_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mean_loss.py").write_text(
        HEAD + "@loss(config('single'))\ndef f(s, cfg):\n    return LossOut(-s.policy_S.mean())\n"
    )
    assert main(["check-loss", "mean_loss:f"]) == 2
    out = capsys.readouterr().out
    assert "\nfail  parts " in out and "never mean() or len()" in " ".join(out.split())
    assert main(["check-loss", "mean_loss:g"]) == 2
    assert capsys.readouterr().err == "megalign: error: loss.name is 'mean_loss:g': module 'mean_loss' has no 'g'\n"
    assert main(["check-loss", "mean_loss:f", "scal=1"]) == 2
    assert "loss.scal is not a known key; did you mean scale?" in capsys.readouterr().err
    assert main(["check-loss", "mean_loss:f", "mode=1"]) == 2  # text, as the class says: a failing check, no refusal
    assert capsys.readouterr().err == ""


def test_the_command_imports_no_megatron(tmp_path):
    code = (
        "import sys\nfrom megalign.__main__ import main\ncode = main(['check-loss', 'gvpo'])\n"
        "assert not any(name.split('.')[0] in ('megatron', 'transformers') for name in sys.modules)\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
