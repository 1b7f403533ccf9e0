"""What a job refuses before it starts: models, layouts and records, in one plain process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalign.config.job import load_config
from megalign.schema import UserError
from megalign.train.check import check
from tests.support.tiny_jobs import ROOT, write_lines, write_model


def samples(*rewards: float) -> dict[str, object]:
    responses = [{"response_ids": [4, 5 + place], "reward": reward} for place, reward in enumerate(rewards)]
    return {"prompt_ids": [1, 2, 3], "responses": responses}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job that is right: `job.yaml`, its model and its records."""
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model", vocab_size=50)
    write_model(folder / "wider", vocab_size=60)
    write_lines(folder / "data.jsonl", [samples(0, 1), samples(1, 0, 0.5)])
    write_lines(folder / "sft.jsonl", [{"prompt_ids": [1], "response_ids": [2]}])
    (folder / "job.yaml").write_text(
        f"run: {{dir: {folder}/run, steps: 2}}\n"
        f"model: {{path: {folder}/model}}\n"
        f"data: {{path: {folder}/data.jsonl, max_length: 16, groups_per_step: 2, tokens_per_micro_batch: 32}}\n"
        "loss: {name: gvpo}\n"
        "optimizer: {lr: 1e-3}\n"
    )
    return folder


def test_what_is_right_is_read(job: Path):
    inputs = check(
        load_config(str(job / "job.yaml"), ["parallel.tensor=2", "engine.megatron.overlap_grad_reduce=true"]), 4
    )
    assert inputs.policy.folder == job / "model" and inputs.tokenizer is None and inputs.prompts == ()
    facts = inputs.policy.facts
    assert (facts.num_heads, facts.num_kv_heads, facts.vocab_size) == (4, 2, 50)
    assert inputs.records is not None
    assert [len(group.responses) for group in inputs.records.dataset.groups] == [2, 3]


BAD = [
    ("model.path={job}/absent", "model.path: {job}/absent is not a directory"),
    (
        "parallel.tensor=4",
        "parallel.tensor is 4: must divide the model's key-value heads 2; values that fit this model: 1, 2",
    ),
    ("parallel.tensor=3", "must divide the number of ranks 4, so be one of 1, 2, 4"),
    ("reference.source={job}/wider", "its vocabulary has 60 tokens; must be that of model.path, 50"),
    ("data.path={job}/absent.jsonl", "absent.jsonl"),
    ("data.max_length=4", "data.jsonl:1"),
    ("engine.megatron.overlap_grad_reduced=true", "engine.megatron.overlap_grad_reduced is not a known key"),
    ("eval.path={job}/absent.jsonl", "absent.jsonl"),
    ("data.filter.teacher_score_keep=0.5", "data.jsonl:1: teacher_scores is missing; data.filter needs it"),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[bad[0] for bad in BAD])
def test_what_is_wrong_is_refused(job: Path, override: str, expected: str):
    cfg = load_config(str(job / "job.yaml"), [override.format(job=job)])
    with pytest.raises(UserError) as raised:
        check(cfg, 4)
    assert expected.format(job=job) in str(raised.value) and "\n" not in str(raised.value)


def test_poft_needs_scores_or_teachers(job: Path):
    poft = ["loss={name: poft}", f"data.path={job}/sft.jsonl"]
    with pytest.raises(UserError, match="sft.jsonl:1: teacher_scores is missing; loss poft needs it"):
        check(load_config(str(job / "job.yaml"), poft), 1)
    teachers = f"teachers=[{{name: a, path: {job}/model}}]"
    records = check(load_config(str(job / "job.yaml"), [*poft, teachers]), 1).records
    assert records is not None and [texts.group_indices for texts in records.teachers] == [[0]]
    with pytest.raises(UserError, match=r"teachers\.0\.path: .*absent is not a directory"):
        check(load_config(str(job / "job.yaml"), [*poft, f"teachers=[{{name: a, path: {job}/absent}}]"]), 1)


def test_launcher_stops_before_it_starts_ranks(job: Path):
    run_dir = job / "refused"
    command = ["bash", str(ROOT / "launch/torchrun.sh"), "3", str(job / "job.yaml"), f"run.dir={run_dir}"]
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where there is no .venv
    done = subprocess.run([*command, "parallel.tensor=2"], capture_output=True, text=True, timeout=120, env=here)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("megalign: error: parallel.tensor x parallel.pipeline")
    assert [path.name for path in run_dir.iterdir()] == ["status.json"]
    assert json.loads((run_dir / "status.json").read_text())["code"] == 2


ANSWER = """
import sys
from megalign.preflight import main
code = main(sys.argv[1:])
print(sorted({"megatron", "transformers"} & {name.split(".")[0] for name in sys.modules}))
sys.exit(code)
"""


@pytest.mark.parametrize(
    "override, code, imported",
    [
        ("parallel.tensor=3", 2, []),
        ("model.path=/nowhere", 2, []),
        ("run.steps=2", 0, []),
        ("engine.megatron.no_such_key=1", 2, ["megatron"]),
    ],
)
def test_checks_import_megatron_only_for_its_own_keys(job: Path, override: str, code: int, imported: list[str]):
    """Megatron takes seconds, and transformers too; a tokenizer would need the latter, which this model lacks."""
    command = [sys.executable, "-c", ANSWER, "--ranks", "1", str(job / "job.yaml"), override]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert str(imported) in result.stdout
