"""Losses of a user's own: found as rewards are, read as strictly as built-in ones, and named when they fail."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from megalign.config.job import dump_config, load_config
from megalign.losses import Scores, choose_loss, loss_function, prepared
from megalign.schema import UserError
from tests.support.my_losses import MarginConfig
from tests.support.slow_losses import PAIRS, ragged
from tests.support.tiny_jobs import write_config

MARGIN = "tests.support.my_losses:margin"
HEAD = """
from megalign.losses import LossConfig, LossOut, Pairing, Scores, Traits, loss

class Config(LossConfig):
    weight: float = 1.0
    mode: str = "plain"

    def traits(self):
        return Traits(Pairing("single"))
"""
GOOD = """
@loss(Config)
def mine(scores, cfg):
    return LossOut(cfg.weight * -scores.policy_S.sum() / scores.num_tokens)
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module whose name no other test has; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = "losses_" + re.sub(r"\W", "_", request.node.name)[-60:]

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_fields_are_those_of_the_users_class():
    cfg = choose_loss({"name": MARGIN, "margin": 0.3})
    assert cfg == MarginConfig(name=MARGIN, margin=0.3) and cfg.traits().pairing.kind == "preference"
    with pytest.raises(
        UserError, match=r"^loss.margn is not a known key; did you mean margin\?; must be one of margin, name$"
    ):
        choose_loss({"name": MARGIN, "margn": 1.0})
    with pytest.raises(UserError, match="^loss.margin is 'x': must be a valid number"):
        choose_loss({"name": MARGIN, "margin": "x"})


def test_configurations_come_back_as_they_were_written(tmp_path, module):
    name = module(HEAD + GOOD)
    config = write_config(tmp_path, loss={"name": f"{name}:mine", "weight": 2.0})
    cfg = load_config(str(config))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(cfg))
    assert load_config(str(again)) == cfg
    assert yaml.safe_load(again.read_text())["loss"] == {"name": f"{name}:mine", "weight": 2.0, "mode": "plain"}


@pytest.mark.parametrize("first", [True, False])
def test_overrides_have_the_types_of_the_users_fields(tmp_path, module, first):
    name = f"loss.name={module(HEAD + GOOD)}:mine"
    fields = ["loss.weight=1.5", "loss.mode=1.5"]
    cfg = load_config(str(write_config(tmp_path)), [name, *fields] if first else [*fields, name])
    assert (cfg.loss.weight, cfg.loss.mode) == (1.5, "1.5")  # type: ignore[attr-defined]


WRONG = {
    "a file": (None, "nowhere.py:f", "module 'nowhere.py' cannot be imported: "),
    "a file that is there": (HEAD, "{}.py:f", "; must be named without .py"),
    "a path": (None, "./nowhere:f", "must be module:function, the module without folder or .py"),
    "a relative module": (None, ".nowhere:f", "must be module:function, the module without folder or .py"),
    "no function's name": (HEAD, "{}:", "must be module:function, the module without folder or .py"),
    "no module": (None, "nowhere:f", "module 'nowhere' cannot be imported: No module named 'nowhere'; looked for in "),
    "no function": (HEAD, "{}:absent", "module '{}' has no 'absent'"),
    "fails at import": ("1 / 0", "{}:f", "cannot be imported: it raised ZeroDivisionError: division by zero ({}.py "),
    "not a function": ("f = 3", "{}:f", "'f' must be a function (scores, cfg)"),
    "not decorated": ("def f(scores, cfg):\n    pass", "{}:f", "must be one under @loss(ItsConfigClass)"),
    "no class": (
        "from megalign.losses import loss\n@loss\ndef f(scores, cfg):\n    pass",
        "{}:f",
        "the function is not a loss; must be one under @loss(ItsConfigClass)",
    ),
    "another class": (
        "from megalign.losses import loss\n@loss(dict)\ndef f(scores, cfg):\n    pass",
        "{}:f",
        "@loss has <class 'dict'>; must be a class derived from LossConfig",
    ),
    "a name of its own": (
        HEAD + '\nclass Named(Config):\n    name: str = "gvpo"\n@loss(Named)\ndef f(scores, cfg):\n    pass',
        "{}:f",
        "Named declares a name; must leave it to LossConfig, where it is module:function",
    ),
    "no traits": (
        "from megalign.losses import LossConfig, loss\nclass Config(LossConfig):\n    pass\n"
        "@loss(Config)\ndef f(scores, cfg):\n    pass",
        "{}:f",
        "loss '{}:f' raised NotImplementedError: Config has no traits()",
    ),
}
TRAITS = {
    "None": "Config.traits() returned None; must be Traits(Pairing(...), ...)",
    "Traits('single')": "Config.traits() returned Traits(pairing='single'",
    "Traits(Pairing('pairs'))": "has Pairing('pairs'); must be one of single, preference, contrast, samples",
    "Traits(Pairing('single'), level='word')": "has level 'word'; must be one of sequence, token",
    "Traits(Pairing('samples'), level='token', coupled=True)": "has level 'token' and coupled; must be one of them",
    "Traits(Pairing('samples'), old_in_advantages=True)": "has old_in_advantages without old; must be both",
    "Traits(Pairing('single'), token_metrics=('a',))": "has token_metrics at level 'sequence'; must be left out",
    "Traits(Pairing('single'), level='token', token_metrics=('loss',))": "has 'loss' among token_metrics",
    "1 / 0": "raised ZeroDivisionError: division by zero (",
}
WRONG |= {
    f"traits {text}": (HEAD.replace('Traits(Pairing("single"))', text) + GOOD, "{}:mine", line)
    for text, line in TRAITS.items()
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case, module, tmp_path):
    text, spec, line = WRONG[case]
    name = module(text) if text is not None else ""
    spec, line = spec.replace("{}", name), line.replace("{}", name)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        choose_loss({"name": spec})
    assert "\n" not in str(caught.value) and spec in str(caught.value)
    with pytest.raises(UserError, match=re.escape(line)):
        load_config(str(write_config(tmp_path, loss={"name": spec})))


FAILING = {
    "scores.policy_S.sum() / 0 * [1][3]": "raised IndexError: list index out of range ({}.py line ",
    "None": "returned None; must be LossOut of tensors without dimensions",
    "scores.policy_S.sum()": "must be LossOut of tensors without dimensions",
    "LossOut(0.0)": "returned LossOut(loss=0.0, metrics={}); must be LossOut of tensors without dimensions",
    "LossOut(scores.policy_S)": "must be LossOut of tensors without dimensions",
    "LossOut(scores.policy_S.sum() * 1j)": "must be LossOut of real numbers",
    "LossOut(scores.policy_S.sum(), {'a': scores.policy_S.sum() * 1j})": "must be LossOut of real numbers",
    "LossOut(scores.policy_S.sum(), {'a': 1.0})": "must be LossOut of tensors without dimensions",
    "LossOut(scores.policy_S.sum(), None)": "must be LossOut of tensors without dimensions, its metrics a dict",
    "LossOut(scores.policy_S.sum(), {'step': scores.policy_S.sum()})": "returned the metric 'step'; must be a word",
    "LossOut(scores.policy_S.sum(), {3: scores.policy_S.sum()})": "returned the metric 3; must be a word",
    "exit(3)": "raised SystemExit: 3 ({}.py line ",
}


@pytest.mark.parametrize("text", FAILING)
def test_failures_in_a_step_name_the_loss(text, module):
    name = module(HEAD + f"@loss(Config)\ndef mine(scores, cfg):\n    return {text}\n")
    line = FAILING[text].replace("{}", name, 1) if "({}" in FAILING[text] else FAILING[text]
    with pytest.raises(UserError, match=f"^loss '{name}:mine' .*{re.escape(line)}"):
        loss_function(choose_loss({"name": f"{name}:mine"}))(ragged(PAIRS), choose_loss({"name": f"{name}:mine"}))


def test_advantages_of_a_users_own(module):
    name = module(
        HEAD
        + "def ones(scores, cfg):\n    return scores.reward_S * cfg.weight\n"
        + "def fails(scores, cfg):\n    raise KeyError('reward')\n"
        + "@loss(Config, prepare=ones)\ndef mine(scores, cfg):\n    pass\n"
        + "@loss(Config, prepare=fails)\ndef broken(scores, cfg):\n    pass\n"
    )
    scores: Scores = ragged(PAIRS)
    made = prepared(scores, choose_loss({"name": f"{name}:mine", "weight": 2.0})).advantage_S
    assert made is not None and torch.equal(made, 2 * scores.reward_S)
    with pytest.raises(UserError, match=f"^loss '{name}:broken' raised KeyError: 'reward'"):
        prepared(scores, choose_loss({"name": f"{name}:broken"}))
