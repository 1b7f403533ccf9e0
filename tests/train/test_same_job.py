"""A run goes on only as the job that it was: what counts as the same job, and the ways on where it is another."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest

from megalign.config.job import load_config
from megalign.preflight import main as preflight
from megalign.train.check import check
from megalign.train.checkpoint_facts import Facts, read_facts
from megalign.train.fingerprint import describe, differences, settings
from tests.support.checkpoint_dirs import describe_files
from tests.support.tiny_jobs import (
    CHARACTERS,
    NOW,
    SPECIAL,
    TEMPLATE,
    metrics,
    read_lines,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
    write_tokenizer,
)

SAMPLES = records("samples")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps, of which the second has a checkpoint, and other inputs than its own."""
    folder = tmp_path_factory.mktemp("same_job")
    write_model(folder / "model", tokenizer=True)
    write_model(folder / "other_weights", tokenizer=True, seed=1)
    shutil.copytree(folder / "model", folder / "other_template")
    template = folder / "other_template" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    write_lines(folder / "data.jsonl", SAMPLES)
    changed = json.loads(json.dumps(SAMPLES))
    changed[3]["responses"][1]["reward"] += 1e-9
    write_lines(folder / "other_reward.jsonl", changed)
    write_lines(folder / "other_order.jsonl", [*SAMPLES[1:], SAMPLES[0]])
    assert train(job_in(folder)) == 0
    return folder


def job_in(folder: Path, **changes) -> Path:
    return write_config(folder, **{"run": {"steps": 2}, **changes})


@pytest.fixture
def job(folder, tmp_path):
    """A copy of the run, with the same inputs at other paths."""
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copyfile(folder / "data.jsonl", tmp_path / "data.jsonl")
    return job_in(tmp_path)


# override: the keys that the line names, with both values
OTHER = {
    "run.seed=1": ["run.seed was 0, is 1"],
    "run.dtype=bf16": ["run.dtype was 'fp32', is 'bf16'"],
    "optimizer.lr=1e-2": ["optimizer.lr was 0.001, is 0.01"],
    "optimizer.betas=[0.9,0.99]": ["optimizer.betas was [0.9, 0.95], is [0.9, 0.99]"],
    "optimizer.eps=1e-6": ["optimizer.eps was 1e-05, is 1e-06"],
    "optimizer.weight_decay=0.1": ["optimizer.weight_decay was 0.0, is 0.1"],
    "optimizer.clip_norm=none": ["optimizer.clip_norm was 1.0, is none"],
    "optimizer.schedule.name=cosine": ["optimizer.schedule.name was 'constant', is 'cosine'"],
    "data.groups_per_step=2": ["data.groups_per_step was 3, is 2"],
    "data.shuffle=false": ["data.shuffle was True, is False"],
    "data.max_length=31": ["data.max_length was 32, is 31"],
    "data.train_on=all_assistant": ["data.train_on was 'last_assistant', is 'all_assistant'"],
    "loss.beta=0.2": ["loss.beta was 0.1, is 0.2"],
    "loss.name=dpo": ["loss.name was 'gvpo', is 'dpo'"],
    "loss.name=grpo": ["loss.name was 'gvpo', is 'grpo'"],
    "reference.source=round_start": ["reference.source was 'initial', is 'round_start'"],
    "reference.source={folder}/model": ["reference.source was 'initial', is ", "/model (weights "],
    "model.path={folder}/other_weights": ["model.path was ", "/model (weights ", "/other_weights (weights "],
    "model.path={folder}/other_template": ["model.path was ", "/other_template (weights "],
    "data.path={folder}/other_reward.jsonl": ["data.path was ", "data.jsonl (8 records, ", "other_reward.jsonl (8 rec"],
    "data.path={folder}/other_order.jsonl": ["data.path was ", "other_order.jsonl (8 records, "],
    "data={{sources: [{{path: {folder}/data.jsonl, weight: 2}}], path: null, max_length: 32, groups_per_step: 3, "
    "tokens_per_micro_batch: 48}}": ["data.path was "],
}


@pytest.mark.parametrize("override", OTHER)
def test_another_job_is_refused(override, job, folder, tmp_path, capfd):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # Longer too, so that the job would take steps, and not only export the old weights.
    assert train(job, override.format(folder=folder), "run.steps=4") == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign")]
    assert len(told) == 1 and "step_00000002 is another job's: " in told[0]
    for part in OTHER[override]:
        assert part in told[0], told[0]
    ways = ("another run.dir", "checkpoint.resume=never", "checkpoint.allow=[")
    assert all(way in told[0] for way in ways), told[0]
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    before.pop(tmp_path / "run" / "status.json"), after.pop(tmp_path / "run" / "status.json")
    assert after == before


def test_the_named_allowance_is_all_it_takes(job, tmp_path, capfd):
    changes = ("optimizer.lr=1e-2", "loss.beta=0.2", "run.seed=1", "run.steps=4")
    assert train(job, *changes) == 2
    allow = capfd.readouterr().err.split("checkpoint.allow=")[1].split("]")[0] + "]"
    assert allow == "[run.seed, loss.beta, optimizer.lr]"
    assert train(job, *changes, f"checkpoint.allow={allow}") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert [line["lr"] for line in metrics(tmp_path / "run")] == [1e-3, 1e-3, 1e-2, 1e-2]
    assert "checkpoint.allow: optimizer.lr was 0.001, is 0.01" in (tmp_path / "run" / "log.txt").read_text()
    # The run is now that job, and what it was is kept.
    assert train(job, *changes, "run.steps=5") == 0
    assert load_config(str(tmp_path / "run" / "earlier_1" / "config.yaml")).optimizer.lr == 1e-3
    assert [line["step"] for line in metrics(tmp_path / "run" / "earlier_1")] == [1, 2]


@pytest.mark.parametrize("allow", ["optimizer", "optimizer.schedule"])
def test_allowed_sections(allow, job):
    assert train(job, "optimizer.schedule.warmup_steps=3", "run.steps=3", f"checkpoint.allow=[{allow}]") == 0


@pytest.mark.parametrize("change", ["run.dtype=bf16", "loss.name=grpo", "data.path={folder}/other_order.jsonl"])
def test_allowed_changes_train(change, job, folder, tmp_path):
    key = change.split("=")[0]
    assert train(job, change.format(folder=folder), "run.steps=3", f"checkpoint.allow=[{key}, loss, reference]") == 0
    assert metrics(tmp_path / "run")[2]["grad_norm"] > 0


@pytest.mark.parametrize("key", ["optimiser.lr", "parallel", "run.steps", "lora.rank"])
def test_unknown_allowance(key, job, capfd):
    assert train(job, f"checkpoint.allow=[loss, {key}]") == 2
    told = capfd.readouterr().err
    assert f"checkpoint.allow.1 is '{key}': must be a key that identifies a job" in told
    assert "optimizer.lr" in told and "data.path" in told and told.count("\n") == 1


FREE = [
    "run.max_minutes=100", "run.max_bad_steps=1", "run.max_pass_gap=1.0", "run.dump_steps=[3]",
    "data.tokens_per_micro_batch=96", "data.packing=false", "engine.recompute=full", "engine.chunk_tokens=64",
    "checkpoint.every=1", "eval.path={folder}/data.jsonl", "eval.every=1", "watchdog.timeout_s=100",
    "export.hf_dir={tmp}/out", "run.steps=3", "data.format=responses", "data.on_bad_record=skip",
]  # fmt: skip


def test_what_may_change_freely(job, folder, tmp_path):
    """Paths have changed as well: model and data were moved."""
    assert train(job, *(one.format(folder=folder, tmp=tmp_path) for one in FREE)) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("resumed from") == 1 and "not checked" not in log


def test_a_resharded_model_is_the_same(job, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copytree(tmp_path / "model", tmp_path / "moved", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, tmp_path / "moved" / path.name)
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    assert train(job, f"model.path={tmp_path}/moved", "run.steps=3") == 0


def test_checkpoint_of_before_fingerprints(job, tmp_path):
    whole = tmp_path / "run" / "checkpoints" / "step_00000002"
    (whole / "checkpoint.json").unlink()
    files = json.loads((whole / "files.json").read_text())
    del files["checkpoint.json"]
    (whole / "files.json").write_text(json.dumps(files))
    assert train(job, "optimizer.lr=1e-2", "run.steps=3") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("does not say which job saved it") == 1
    assert train(job, "optimizer.lr=1e-3", "run.steps=4") == 2


def test_checkpoint_of_before_checkpoint_json(job, tmp_path):
    """Its job.json knows the job alone; the optimizer and adapters are in Megatron's own values."""
    whole = tmp_path / "run" / "checkpoints" / "step_00000002"
    facts = json.loads((whole / "checkpoint.json").read_text())
    assert (facts["engine"], facts["dtype"], facts["optimizer"]) == ("megatron", "torch.float32", True)
    assert (facts["adapters"], facts["base"]) == (None, facts["job"]["model"]["path"]["shown"].split(" (")[0])
    old = {key: facts[key] for key in ("format", "job", "num_steps", "started_from")}
    (whole / "checkpoint.json").unlink()
    (whole / "job.json").write_text(json.dumps(old))
    (whole / "files.json").unlink()
    before = read_facts(whole)
    known = {key: value for key, value in facts.items() if key not in ("format", "versions", "step")}
    assert before == Facts(**known)  # of which step it is, it did not say then
    assert train(job, "optimizer.lr=1e-2", "run.steps=3") == 2
    assert train(job, "run.steps=3") == 0
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()


def test_checkpoint_of_another_engine(job, tmp_path, capfd):
    path = tmp_path / "run" / "checkpoints" / "step_00000002" / "checkpoint.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"engine": "deepspeed"}, indent=1))
    path.with_name("files.json").write_text(json.dumps(describe_files(path.parent)))
    assert train(job, "run.steps=3") == 2
    told = capfd.readouterr().err
    assert "step_00000002 was saved by engine deepspeed; must be one of engine.name megatron" in told
    assert told.count("\n") == 1


def test_damaged_job_file(job, tmp_path, capfd):
    path = tmp_path / "run" / "checkpoints" / "step_00000002" / "checkpoint.json"
    good = json.loads(path.read_text())
    path.write_text("{" + path.read_text()[1:].replace('"', "'"))  # as long as before
    assert train(job) == 2
    told = capfd.readouterr().err
    assert "checkpoint.json has checksum" in told and told.count("\n") == 1
    wrong_kind = json.dumps({**good, "optimizer": "yes"})
    for text in ('{"format": 1}', '{"format": 1, "job": {}}', wrong_kind):
        path.write_text(text)
        path.with_name("files.json").write_text(json.dumps(describe_files(path.parent)))
        assert train(job) == 2
        told = capfd.readouterr().err
        assert "checkpoint.json cannot be read" in told and told.count("\n") == 1
    path.unlink()
    assert train(job) == 2
    assert "checkpoint.json is missing" in capfd.readouterr().err
    path.with_name("files.json").write_text("[1")
    assert train(job) == 2
    told = capfd.readouterr().err
    assert "files.json cannot be read" in told and told.count("\n") == 1


def test_named_checkpoint_of_another_job(folder, job, tmp_path, capfd):
    named = (f"checkpoint.resume={folder}/run", f"run.dir={tmp_path}/new")
    assert train(job, *named, "optimizer.lr=1e-2") == 2
    assert "another job's: optimizer.lr was 0.001, is 0.01" in capfd.readouterr().err
    assert train(job, *named, "optimizer.lr=1e-2", "run.steps=3", "checkpoint.allow=[optimizer.lr]") == 0


def test_rounds_know_their_prompts_and_settings(folder, tmp_path, capfd):
    sections = round_sections(tmp_path, rounds=1)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    assert train(config, NOW) == 75
    for change, part in {
        "rollout.temperature=0.5": "rollout.temperature was 1.0, is 0.5",
        "rollout.k=2": "rollout.k was 3, is 2",
        "rollout.reward=exact_match": "answer",
    }.items():
        assert train(config, change) == 2 and part in capfd.readouterr().err
    lines = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text(lines.replace('"bonus": 0.0', '"bonus": 0.5'))
    assert train(config) == 2 and "rollout.path was " in capfd.readouterr().err
    assert train(config, "checkpoint.allow=[rollout.path, loss]", "loss.beta=0.3", "rollout.rounds=2") == 0
    assert "the round in progress is sampled anew" in (tmp_path / "run" / "log.txt").read_text()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    # From rounds to records there is no way on.
    write_lines(tmp_path / "data.jsonl", SAMPLES)
    plain = write_config(tmp_path, model={"path": str(folder / "model")})
    capfd.readouterr()
    assert train(plain, "checkpoint.allow=[rollout, loss, data]") == 2
    told = capfd.readouterr().err
    assert "rollout was given, is none" in told and "checkpoint.allow" not in told


def test_resumed_run_without_steps_left(job, tmp_path):
    assert train(job) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "no steps are left: the checkpoint is after step 2 and run.steps makes 2 steps" in log
    assert all(way in log for way in ("raise run.steps", "another run.dir", "checkpoint.resume=never"))


def test_a_schedule_of_another_length_is_told(folder, tmp_path):
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    config = job_in(tmp_path, optimizer={"schedule": {"name": "linear"}})
    assert train(config) == 0
    assert train(config, "run.steps=4") == 0
    # Linear from 1e-3 at step 0 to 0 at the last step: step 3 of 4 has a quarter; of 2 steps nothing would be left.
    told = "the run was 2 steps long and now is 4: the learning rate of step 3 is 0.00025 instead of 0"
    assert told in (tmp_path / "run" / "log.txt").read_text()


def test_every_key_of_every_section_is_compared(folder):
    """A key that is new somewhere is part of the fingerprint until somebody says that it may change."""
    cfg = load_config(str(job_in(folder)))
    tree = settings(cfg)
    data = {*cfg.data.model_dump()} - {*tree["data"]}
    assert data == {
        "sources", "format", "tokens_per_micro_batch", "packing", "on_bad_record", "extra_fields",
    }  # fmt: skip
    assert tree["optimizer"] == cfg.optimizer.model_dump(mode="json") and tree["loss"] == cfg.loss.model_dump()
    job = describe(cfg, check(cfg, 1), None)
    assert differences(job, job) == [] and differences(tree, json.loads(json.dumps(tree))) == []


DATED = "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE


def trained_on(run_dir: Path, step: int) -> str:
    """The day in the prompts that a step trained on."""
    lines = read_lines(run_dir / "steps" / f"step_{step}.jsonl")
    characters = SPECIAL + list(CHARACTERS)
    (day,) = {"".join(characters[number] for number in line["prompt_ids"][:10]) for line in lines}
    return day


def test_the_day_of_a_job_is_that_of_its_start(tmp_path, capfd):
    write_model(tmp_path / "model")
    write_tokenizer(tmp_path / "model", template=DATED)
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    write_lines(tmp_path / "data.jsonl", [{"messages": turns}] * 3)
    config = write_config(tmp_path, loss={"name": "sft"}, run={"steps": 3, "dump_steps": [1, 2, 3]})
    run = tmp_path / "run"
    days = {str(date.today())}
    assert train(config, NOW, "run.dir=" + str(tmp_path / "now")) == 75
    days.add(str(date.today()))
    day = load_config(str(tmp_path / "now" / "config.yaml")).data.date
    assert day in days and trained_on(tmp_path / "now", 1) == day
    # A run that began on another day keeps that day.
    assert train(config, NOW, "data.date=2020-02-29") == 75
    assert train(config, NOW) == 75
    assert trained_on(run, 1) == trained_on(run, 2) == "2020-02-29"
    assert load_config(str(run / "config.yaml")).data.date == "2020-02-29"
    assert preflight(["--ranks", "1", str(config)]) == 0
    assert train(config, "data.date=2021-01-01") == 2
    assert "data.date was '2020-02-29', is '2021-01-01'" in capfd.readouterr().err
    # So does one that was killed before it saved; another job there has its own day.
    shutil.rmtree(run / "checkpoints")
    assert train(config, NOW) == 75 and trained_on(run, 1) == "2020-02-29"
    shutil.rmtree(run / "checkpoints")
    assert train(config, NOW, "run.seed=1") == 75 and trained_on(run, 1) in days


def test_refusal_leaves_the_status_of_the_run_that_is_there(job, tmp_path, capfd):
    before = status(tmp_path / "run")
    capfd.readouterr()
    assert train(job, "run.seed=3") == 2
    assert "run.seed was 0, is 3" in capfd.readouterr().err
    assert status(tmp_path / "run") == before
