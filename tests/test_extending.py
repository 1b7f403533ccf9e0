"""docs/extending.md: each of its files is written where it says, and works; a new loss or family is that one file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megalign.convert.families
import megalign.losses
from megalign.__main__ import main
from megalign.config.job import load_config
from megalign.convert import read_model_config
from megalign.convert.rules import FAMILIES
from megalign.convert.transfer import hf_to_megatron, megatron_to_hf
from megalign.losses import LOSSES
from megalign.losses.check import check_loss
from megalign.modules import import_modules
from megalign.rollout.rewards import RewardCall, choose_reward
from megalign.schema import UserError
from tests.support.tiny_jobs import ROOT, metrics, records, train, write_config, write_lines, write_model

TEXT = (ROOT / "docs" / "extending.md").read_text()
# path: the Python text of a block, whose first line is its path
FILES = {
    code.split("\n", 1)[0].removeprefix("# "): code.split("\n", 1)[1]
    for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
}


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Put a block of the document into a folder that its package's path is extended by, and let the package find it."""
    undo = []

    def add(package: ModuleType, registry: dict[str, Any], path: str) -> None:
        name = Path(path).stem
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(FILES[path])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
        before = dict(registry)
        undo.append(lambda: (registry.clear(), registry.update(before), sys.modules.pop(f"{package.__name__}.{name}")))
        import_modules(package.__name__, package.__path__)

    yield add
    for one in undo:
        one()


@pytest.fixture
def job(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("pairs"))
    return tmp_path


def test_a_loss_of_ones_own(job, monkeypatch, capsys):
    text = FILES["my_losses.py"]
    assert len([line for line in text.splitlines() if line.strip()]) <= 15
    (job / "my_losses.py").write_text(text)
    monkeypatch.syspath_prepend(job)
    command, launch = re.findall(r"```text\n(.*?)\n```", TEXT, flags=re.DOTALL)
    assert main(command.split()[1:]) == 0, capsys.readouterr().out
    override = re.findall(r'"(loss=.*?)"', launch)
    assert override == ["loss={name: my_losses:margin_loss, margin: 0.5}"] and "configs/dpo.yaml" in launch
    assert train(write_config(job, loss={"name": "dpo"}), *override) == 0
    assert all(line["grad_norm"] > 0 and 0 <= line["violations"] <= 1 for line in metrics(job / "run"))


def test_a_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FILES["my_rewards.py"])
    monkeypatch.syspath_prepend(tmp_path)
    reward = choose_reward("my_rewards:short")
    assert [reward("?", text, {"word": "yes", "limit": 5}, "here") for text in ("yes", "no", "yes, yes")] == [1, 0, 0]


def test_a_reward_of_many_responses_gives_each_its_own(tmp_path, monkeypatch):
    (tmp_path / "my_checker.py").write_text(FILES["my_checker.py"])
    monkeypatch.syspath_prepend(tmp_path)
    reward = choose_reward("my_checker:parses")
    calls = [RewardCall("?", text, {}, "here") for text in ("x = 1", "x =", "print(2)")]
    assert reward.score(calls) == [1, 0, 1]
    assert [reward.score([call]) for call in calls] == [[1], [0], [1]]


def test_a_built_in_loss(add, job):
    add(megalign.losses, LOSSES, "megalign/losses/likelihood_contrast.py")
    config = write_config(job, loss={"name": "likelihood_contrast"})
    assert train(config, "loss.weight=0.25") == 0
    assert all(line["grad_norm"] > 0 and line["pass_mode"] == "single_pass" for line in metrics(job / "run"))
    written = load_config(str(job / "run" / "config.yaml")).loss
    assert written.model_dump() == {"name": "likelihood_contrast", "weight": 0.25}
    assert not any(result.problem for result in check_loss(written))
    with pytest.raises(UserError, match=r"loss.wight is not a known key; did you mean weight\?"):
        load_config(str(config), ["loss.wight=1"])


def test_a_family(add, tmp_path):
    source = write_model(tmp_path / "hf")
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(about | {"model_type": "newllama", "architectures": ["NewLlamaForCausalLM"]})
    )
    with pytest.raises(UserError, match="NewLlamaForCausalLM"):
        read_model_config(source)
    add(megalign.convert.families, FAMILIES, "megalign/convert/families/newllama.py")
    assert read_model_config(source).family == "newllama"
    hf_to_megatron(str(source), tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    there, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)


def test_every_file_of_the_packages_is_found():
    for package in (megalign.losses, megalign.convert.families):
        for folder in package.__path__:
            names = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
            assert names <= {name.rpartition(".")[2] for name in sys.modules if name.startswith(package.__name__)}
    assert {"llama", "qwen3_moe", "deepseek_v3"} <= set(FAMILIES) and "gvpo" in LOSSES


def test_every_block_is_used():
    assert set(FILES) == {
        "my_losses.py",
        "my_rewards.py",
        "my_checker.py",
        "megalign/losses/likelihood_contrast.py",
        "megalign/convert/families/newllama.py",
    }
