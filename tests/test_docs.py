"""README.md and docs/: their commands run, their links lead somewhere, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megalign import preflight
from megalign.__main__ import COMMANDS, main
from megalign.config.keys import all_sections
from megalign.config.sections import SECTIONS
from megalign.losses.base import LOSSES, loss_function
from megalign.losses.random_scores import random_scores
from megalign.rollout.rewards import RewardCall, choose_reward
from tests.support.pages import PAGES, ROOT, anchors, blocks, commands, links, quoted, table_names
from tests.support.parity_layouts import DEFAULT, LAYOUTS
from tests.support.tiny_jobs import metrics, round_sections, train, write_config, write_lines, write_model

README, WATCHING = PAGES[0], ROOT / "docs/watching.md"
# Commands that are not run here, by their first words, and why.
EXEMPT = {
    "bash launch/quickstart.sh": "takes minutes; its parts are in tests/test_quickstart.py",
    "bash tests/run.sh": "runs these tests",
    "tensorboard --logdir": "serves until it is stopped",
}
MODEL = "model.path=models/base"
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The files that the pages' commands name: a model, 20 records of each kind, and the configurations."""
    folder = tmp_path_factory.mktemp("workspace")
    write_model(folder / "models/base", tokenizer=True, num_key_value_heads=4, max_position_embeddings=4096)
    (folder / "configs").symlink_to(ROOT / "configs")
    sums = [(f"{number}+{number % 7}=", str(number + number % 7)) for number in range(20)]
    pairs = [{"prompt": asked, "chosen": answer, "rejected": "no"} for asked, answer in sums]
    samples = [
        {"prompt": asked, "responses": [{"text": answer, "reward": 1.0}, {"text": "no", "reward": 0.0}]}
        for asked, answer in sums
    ]
    (folder / "data").mkdir()
    write_lines(folder / "data/sft.jsonl", [{"prompt": asked, "completion": answer} for asked, answer in sums])
    write_lines(folder / "data/preferences.jsonl", pairs)
    write_lines(folder / "data/samples.jsonl", samples)
    write_lines(folder / "data/prompts.jsonl", [{"prompt": asked, "answer": answer} for asked, answer in sums])
    return folder


def with_model(words: list[str]) -> list[str]:
    """The arguments of a job, with the workspace's model where they name none."""
    return words if any(word.startswith("model.path=") for word in words) else [*words, MODEL]


def run(words: list[str]) -> int:
    """Run a documented command in this process; of a launch, the checks in front of it."""
    shown = " ".join(words)
    if any(shown.startswith(start) for start in EXEMPT):
        return 0
    while re.match(r"[A-Z_]+=", words[0]):  # variables of a launcher
        words = words[1:]
    if "launch/slurm.sbatch" in words:  # the checks that it starts with, of two nodes with eight ranks
        job = [word.replace("%a", "1") for word in words[words.index("launch/slurm.sbatch") + 1 :]]
        return preflight.main(["--ranks", "16", *with_model(job)])
    if words[0] == "bash" and words[1] in ("launch/mpirun.sh", "launch/deepspeed.sh"):  # which begin with the checks
        return preflight.main(["--ranks", words[2], *with_model(words[3:])])
    if words[:3] == ["python", "-m", "megalign"]:
        words = ["megalign", *words[3:]]
    elif words[:3] == ["python", "-m", "megalign.preflight"]:
        return preflight.main(with_model(words[3:]))
    assert words[0] == "megalign", f"neither run nor exempt: {shown}"
    if words[1] == "launch":
        return preflight.main(["--ranks", words[2], *with_model(words[3:])])
    return main(with_model(words[1:]) if words[1] in ("train", "rollout") else words[1:])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_run(page, workspace, monkeypatch, capfd):
    monkeypatch.chdir(workspace)
    for place, words in commands(page):
        written, words = (words[-1], words[:-2]) if ">" in words else (None, words)
        capfd.readouterr()
        assert run(words) == 0, f"{place}: {' '.join(words)}\n{capfd.readouterr().err}"
        if written is not None:
            Path(written).write_text(capfd.readouterr().out)


def test_exempt_commands_are_in_use():
    used = [" ".join(words) for page in PAGES for _, words in commands(page)]
    assert [start for start in EXEMPT if not any(text.startswith(start) for text in used)] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    wrong = []
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def test_every_page_is_in_the_index():
    index = links(ROOT / "docs/README.md")
    assert sorted(index) == sorted(page.name for page in PAGES[1:] if page.name != "README.md")
    assert {f"docs/{name}" for name in index} <= {target.partition("#")[0] for target in links(README)}


def test_readme_is_short_and_pages_are_ascii():
    lines = README.read_text().splitlines()
    assert len(lines) < 150 and max(map(len, lines)) <= 120
    for page in PAGES:
        assert page.read_text().isascii(), page.name
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg")) < 100_000


def test_numbers_of_layouts_are_those_of_the_tests():
    told, readme = " ".join((ROOT / "docs/verification.md").read_text().split()), " ".join(README.read_text().split())
    assert f"{len(LAYOUTS)} layouts of up to four ranks" in told and f"{len(DEFAULT)} layouts by default" in told
    assert f"{len(LAYOUTS)} mixtures on up to four processes" in readme
    assert max(layout.num_processes for layout in LAYOUTS.values()) == 4


FOLDERS = ("megalign", "tests", "tools", "launch", "configs", "benchmarks", "docs")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_and_modules_that_are_named_exist(page):
    wrong = []
    # Python blocks have files of a user's own; extending.md's are written and used by tests/test_extending.py.
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]*\w/?)", text):
        if not any(word.isupper() for word in re.findall(r"[A-Z]+", name)) and not (ROOT / name).exists():
            wrong.append(name)
    for name in re.findall(r"python -m ((?:megalign|benchmarks)[\w.]*)", text):
        path = ROOT / name.replace(".", "/")
        if not path.is_dir() and not path.with_suffix(".py").is_file():
            wrong.append(name)
    assert wrong == []
    named = re.findall(r"^(?:python -m )?megalign ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    named += re.findall(r"`(?:python -m )?megalign ([a-z-]+)", page.read_text())
    assert set(named) <= COMMANDS.keys()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_keys_that_are_named_exist(page):
    known = {key.name.replace("[]", "") for section in all_sections() for key in section.keys}
    known |= {name.rsplit(".", depth)[0] for name in known for depth in (1, 2)} | set(SECTIONS)
    named = [word for text in quoted(page) for word in re.findall(r"^(?:bash .* )?([a-z]+\.[a-z_.]*[a-z])\b", text)]
    for block in blocks(page):
        if block.language == "yaml":
            tree = yaml.safe_load(block.text)
            named += [f"{name}.{key}" for name, keys in tree.items() if isinstance(keys, dict) for key in keys]
    named = [name for name in named if name.partition(".")[0] in SECTIONS and not name.startswith("engine.megatron.")]
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_is_python(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, f"{page.name}:{block.line}", "exec")


def test_the_rewards_of_the_page_work(tmp_path, monkeypatch):
    code = next(block.text for block in blocks(ROOT / "docs/rollouts.md") if block.language == "python")
    (tmp_path / "answer_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    calls = [RewardCall("2+3=", response, {"answer": "5"}, "here") for response in ("5", "no")]
    assert choose_reward("answer_rewards:brief").score(calls) == [1 - 0.001, -0.002]
    assert choose_reward("answer_rewards:judged").score(calls) == [1, 0]


def test_every_folder_of_the_package_is_described():
    text = (ROOT / "docs/engines.md").read_text()
    names = [path.name for path in (ROOT / "megalign").iterdir() if not path.name.startswith("__")]
    assert [name for name in names if not re.search(rf"\b{name}(/|\b)", text)] == []


def metrics_of_losses() -> set[str]:
    """The names of every built-in loss's metrics, with and without known rewards."""
    names = {"aux_loss", "entropy", "token_accuracy"}  # of the step, where a loss or the model asks for them
    for name, entry in LOSSES.items():
        variants = [{}, {"beta": 0.1}] if "beta" in entry.config.model_fields else [{}]
        for fields in variants:
            config = entry.config(name=name, **fields)
            for rewards in (None, True):
                scores = random_scores(config.traits(), rewards=rewards)
                names |= set(loss_function(config)(scores, config).metrics)
    return names


def test_every_metric_is_described_with_its_unit(workspace, tmp_path):
    """The lines of a job of rounds with evaluation, and every loss's own names; and nothing else is described."""
    sections = round_sections(tmp_path, reward="exact_match", path=str(workspace / "data/prompts.jsonl"))
    sections |= {"loss": {"name": "grpo"}, "eval": {"path": str(workspace / "data/prompts.jsonl")}}
    config = write_config(tmp_path, **{"model": {"path": str(workspace / "models/base")}, **sections})
    train(config, "checkpoint.every=1")
    written = {name for line in metrics(tmp_path / "run") for name in line} | {"eval_loss"} | metrics_of_losses()
    text = WATCHING.read_text()
    described = set(table_names(text[text.index("## Metrics") :]))
    assert described == written
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| `\w+` \|", line)]
    assert [row[1] for row in rows if not row[2].strip()] == []
