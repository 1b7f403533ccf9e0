"""One job after another from a configuration file to an exported checkpoint, in one process."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from megalign.config.job import load_config
from tests.support.tiny_jobs import (
    hf_logps,
    metrics,
    read_lines,
    records,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

STEP_KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens", "sequences", "groups", "seconds", "tokens_per_second",
    "padding_fraction", "pass_mode", "pass_gap", "peak_memory_gb", "epoch", "time",
}  # fmt: skip
# loss: records, its section, keys it adds, and the roles of a step's sequences.
LOSSES = {
    "sft": ("singles", {}, set(), {"response"}),
    "poft": ("scored", {}, {"tau_mean"}, {"response"}),
    "dpo": ("pairs", {}, {"accuracy"}, {"chosen", "rejected"}),
    "ipo": ("pairs", {"name": "dpo", "variant": "ipo"}, {"accuracy"}, {"chosen", "rejected"}),
    "simpo": ("pairs", {}, {"accuracy"}, {"chosen", "rejected"}),
    "orpo": ("pairs", {}, {"accuracy", "log_odds_ratio"}, {"chosen", "rejected"}),
    "epa": ("samples", {}, {"p_positive", "accuracy_strong", "accuracy_weak", "implicit_reward_slope"},
            {"positive", "strong", "weak"}),
    "grpo": ("samples", {"beta": 0.1}, {"reward_mean", "clip_fraction", "kl"}, {"response"}),
    "dapo": ("samples", {"name": "grpo", "variant": "dapo"}, {"reward_mean", "clip_fraction"}, {"response"}),
    "dr_grpo": ("samples", {"name": "grpo", "variant": "dr_grpo", "max_response_length": 8}, {"clip_fraction"},
                {"response"}),
    "rloo": ("samples", {}, {"reward_mean", "clip_fraction"}, {"response"}),
    "gvpo": ("samples", {}, {"reward_mean", "kl", "weight_sq"}, {"response"}),
}  # fmt: skip
HAS_REFERENCE = {"dpo", "ipo", "epa", "grpo", "rloo", "gvpo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module", params=LOSSES)
def run(request, folder):
    """(name, folder of the job) after three steps with step 1 and 3 dumped."""
    name = request.param
    kind, section, _, _ = LOSSES[name]
    job = folder / name
    job.mkdir()
    write_lines(job / "data.jsonl", records(kind))
    config = write_config(
        job,
        model={"path": str(folder / "model")},
        loss={"name": name, **section},
        run={"dump_steps": [1, 3]},
        export={"hf_dir": str(job / "out")},
    )
    assert train(config) == 0
    return name, job


def test_metrics_say_everything_and_are_finite(run):
    name, job = run
    lines = metrics(job / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert STEP_KEYS | LOSSES[name][2] <= line.keys()
        for key, value in line.items():
            assert key in ("pass_mode", "pass_gap", "time") or math.isfinite(value), (key, value)
        assert line["lr"] == 1e-3 and line["groups"] == 3 and 0 <= line["padding_fraction"] < 1
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert line["grad_norm"] > 0 and line["epoch"] == pytest.approx(line["step"] * 3 / 8)
        assert (line["pass_gap"] is None) == (line["pass_mode"] == "single_pass")
        assert not line["pass_gap"]  # on a CPU in fp32 both passes compute the same bits
    first = "known_scores" if name in HAS_REFERENCE | {"dapo", "dr_grpo"} else "single_pass"
    assert lines[0]["pass_mode"] == first


def test_run_directory_tells_the_run(run):
    name, job = run
    resolved = load_config(str(job / "run" / "config.yaml"))
    assert resolved == load_config(str(job / "job.yaml"), [f"data.date={resolved.data.date}"])
    assert resolved.data.date is not None  # the day the job began, for whoever runs it again
    log = (job / "run" / "log.txt").read_text()
    assert "torch layers" in log and "tensor 1 x pipeline 1 x data 1" in log and "exported" in log
    assert f"step 1: {metrics(job / 'run')[0]['pass_mode'].replace('_', ' ')}" in log
    assert status(job / "run") == {"code": 0, "reason": "done", "step": 3}


def test_dumped_step_is_what_was_trained_on(run, folder):
    name, job = run
    assert sorted(path.name for path in (job / "run" / "steps").iterdir()) == ["step_1.jsonl", "step_3.jsonl"]
    lines = read_lines(job / "run" / "steps" / "step_1.jsonl")
    keys = {"record", "group", "role", "prompt_ids", "response_ids", "logp", "reference_logp", "coefficient"}
    assert all(line.keys() == keys for line in lines)
    step = metrics(job / "run")[0]
    assert len(lines) == step["sequences"]
    assert sum(len(line["prompt_ids"] + line["response_ids"]) for line in lines) == step["tokens"]
    assert {line["group"] for line in lines} == {0, 1, 2} and {line["role"] for line in lines} == LOSSES[name][3]
    source = read_lines(job / "data.jsonl")
    assert all(source[line["record"]]["prompt_ids"] == line["prompt_ids"] for line in lines)
    one = lines[1]
    expected = hf_logps(folder / "model", one["prompt_ids"], one["response_ids"]).sum().item()
    assert one["logp"] == pytest.approx(expected, rel=1e-5)
    for line in lines:  # the weights are still the reference's
        assert line["reference_logp"] == (line["logp"] if name in HAS_REFERENCE else None)
    later = read_lines(job / "run" / "steps" / "step_3.jsonl")
    assert name not in HAS_REFERENCE or any(line["reference_logp"] != line["logp"] for line in later)


def test_coefficients_have_the_shape_of_their_loss(run):
    """dL/ds of each loss at step 1, where policy and reference agree."""
    name, job = run
    lines = read_lines(job / "run" / "steps" / "step_1.jsonl")
    by_group: dict[int, list[float]] = {}
    for line in lines:
        by_group.setdefault(line["group"], []).append(line["coefficient"])
    if name == "sft":
        count = sum(len(line["response_ids"]) for line in lines)
        assert [line["coefficient"] for line in lines] == pytest.approx([-1 / count] * len(lines), rel=1e-6)
    elif name == "poft":
        for line in lines:  # -tau / |y| / G
            policy = line["logp"] / len(line["response_ids"])
            scores = read_lines(job / "data.jsonl")[line["record"]]["teacher_scores"]
            gap = policy - (scores["a"] + scores["b"]) / 2
            tau = 1 / (1 + math.exp(gap))
            assert line["coefficient"] == pytest.approx(-tau / len(line["response_ids"]) / 3, rel=1e-6)
    elif name == "dpo":
        signs = {"chosen": -1, "rejected": 1}  # beta sigmoid(0) / G = 0.1 x 0.5 / 3
        expected = [signs[line["role"]] * 0.1 * 0.5 / 3 for line in lines]
        assert [line["coefficient"] for line in lines] == pytest.approx(expected)
    elif name in ("epa", "gvpo", "rloo"):
        assert all(sum(group) == pytest.approx(0, abs=1e-12) and max(group) > 0 for group in by_group.values())
    else:
        assert all(min(group) < 0 < max(group) for group in by_group.values())


def test_export_loads_in_transformers(run, folder):
    name, job = run
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(job / "out").state_dict()
    assert before.keys() == after.keys() and all(after[key].dtype == torch.float32 for key in after)
    moved = max((before[key] - after[key]).abs().max().item() for key in before)
    assert 1e-3 <= moved <= 6e-3  # AdamW moves a weight by about lr a step
