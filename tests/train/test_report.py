"""What a run writes to its log, its metrics and the console: a line a step, rounds with their texts, a summary."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import select
import sys
from datetime import datetime

import pytest
from rich.console import Console, Group

from megalign.config.job import load_config
from megalign.train.console import StepBar, clock, duration, evaluation_numbers, step_numbers
from megalign.train.cut_back import keep_metrics_up_to
from megalign.train.evaluation import evaluation_due
from megalign.train.plan import evaluation_plan
from megalign.train.reporter import Reporter, start_log
from megalign.train.round_report import quoted, round_sample, shows_sample
from megalign.train.summary import as_text, summary_rows, summary_table, time_line
from tests.support.tiny_jobs import (
    NOW,
    metrics,
    records,
    round_sections,
    train,
    training_numbers,
    write_config,
    write_lines,
    write_model,
)

STEP = {"loss": 0.123456, "grad_norm": 12.3456, "lr": 1e-4, "tokens_per_second": 1234.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_model(folder / "model", tokenizer=True)
    for kind in ("samples", "pairs", "singles"):
        write_lines(folder / f"{kind}.jsonl", records(kind))
    return folder


def config_of(folder, tmp_path, kind, loss, **changes):
    data = {"path": str(folder / f"{kind}.jsonl"), **changes.pop("data", {})}
    return write_config(tmp_path, model={"path": str(folder / "model")}, data=data, loss={"name": loss}, **changes)


def log_of(run_dir):
    """The log's lines without their times, which every line that begins a message has."""
    lines = (run_dir / "log.txt").read_text().splitlines()
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines]


def test_log_has_a_line_a_step_and_the_console_the_first_and_the_last(folder, tmp_path, capfd):
    assert train(config_of(folder, tmp_path, "pairs", "dpo", run={"steps": 5}, data={"groups_per_step": 2})) == 0
    told = [line for line in log_of(tmp_path / "run") if re.match(r"step \d+/5 ", line)]
    assert len(told) == 5
    for number, (line, numbers) in enumerate(zip(told, metrics(tmp_path / "run"), strict=True), start=1):
        assert line.startswith(
            f"step {number}/5 epoch {number / 4:.2f} loss {numbers['loss']:.4g} grad_norm {numbers['grad_norm']:.4g} "
            f"lr 0.001 accuracy {numbers['accuracy']:.3f} margin {numbers['implicit_reward_margin']:.3f} "
        )
        assert re.search(r" \d+ tok/s left \d+:\d\d:\d\d$", line)
    seen = capfd.readouterr().err.splitlines()
    assert told[0] in seen and told[-1] in seen


def test_time_is_utc_and_epoch_is_where_the_data_are(folder, tmp_path):
    assert train(config_of(folder, tmp_path, "singles", "sft")) == 0
    lines = metrics(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [3 / 8, 6 / 8, 9 / 8]
    times = [datetime.fromisoformat(line["time"].replace("Z", "+00:00")) for line in lines]
    assert times == sorted(times) and all(time.utcoffset().total_seconds() == 0 for time in times)


def test_evaluated_before_and_after_without_every(folder, tmp_path, capfd):
    config = config_of(folder, tmp_path, "pairs", "dpo", eval={"path": str(folder / "pairs.jsonl")})
    assert train(config, f"export.hf_dir={tmp_path}/out") == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]
    assert lines[0].keys() >= {"epoch", "time", "eval_accuracy", "eval_seconds"} and "loss" not in lines[0]
    assert lines[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)  # log 2: policy and reference are the same
    told = log_of(tmp_path / "run")
    plan = [line for line in told if line.startswith("evaluation on 8 records")]
    assert len(plan) == 1 and "before the first step, after the last" in plan[0]
    assert plan[0].endswith("since eval.every is 0; 2 in all")
    first, last = (line for line in told if re.match("evaluation (before|after)", line))
    assert first.startswith("evaluation before the first step: loss 0.6931, accuracy 0")
    assert last.startswith(f"evaluation after step 3: loss {lines[3]['eval_loss']:.4g}, accuracy ")
    table = told[next(at for at, line in enumerate(told) if line.startswith("summary of dpo")) :]
    assert table[1].split() == ["step", "loss", "accuracy", "margin"]
    best = min(lines[0], lines[3], key=lambda line: line["eval_loss"])
    assert table[3].split()[:6] == [
        "best",
        "evaluation",
        "(lowest",
        "loss)",
        str(best["step"]),
        f"{best['eval_loss']:.4g}",
    ]
    assert [line.split()[:2] for line in table[2:7]] == [
        ["first", "evaluation"], ["best", "evaluation"], ["last", "evaluation"], ["first", "training"],
        ["last", "training"],
    ]  # fmt: skip
    assert table[7].startswith("3 steps in ") and f"model: {tmp_path}/out" in table
    assert any(line.startswith("checkpoints: ") for line in table)
    seen = capfd.readouterr().err.splitlines()
    assert {first, last, *table[1:]} <= set(seen)


JOBS = {
    "sft": ("singles", {"name": "sft"}, {}),
    "gvpo": ("samples", {"name": "gvpo"}, {}),
    "grpo in bf16": ("samples", {"name": "grpo", "beta": 0.1}, {"run": {"dtype": "bf16"}}),
    "epa": ("samples", {"name": "epa"}, {}),
    "rounds": ("rounds", {"name": "gvpo"}, {"reference": {"source": "round_start"}}),
}


@pytest.mark.parametrize("name", JOBS)
def test_evaluating_changes_no_bit_of_training(name, folder, tmp_path):
    kind, loss, changes = JOBS[name]
    if kind == "rounds":
        changes = {**changes, **round_sections(tmp_path)}
        held_out = tmp_path / "prompts.jsonl"
    else:
        held_out = folder / f"{kind}.jsonl"
        changes = {**changes, "data": {"path": str(held_out)}}
    config = write_config(tmp_path, model={"path": str(folder / "model")}, loss=loss, **changes)
    assert train(config, f"run.dir={tmp_path}/without") == 0
    assert train(config, f"eval.path={held_out}", "eval.every=1") == 0
    lines, without = metrics(tmp_path / "run"), metrics(tmp_path / "without")
    assert [line["step"] for line in lines] == [0, *(line["step"] for line in without)]
    assert all(any(key.startswith("eval_") for key in line) for line in lines)
    assert training_numbers(lines) == training_numbers(without)


def test_resume_neither_repeats_nor_loses_the_first_evaluation(folder, tmp_path):
    """A run that goes on keeps its line of step 0; one that begins anew has only its own."""
    config = config_of(folder, tmp_path, "samples", "gvpo", eval={"path": str(folder / "samples.jsonl")})
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    assert [train(config, NOW) for _ in range(3)] == [75, 75, 0]
    assert "run.max_minutes is over after step 2 of 3; the same command goes on from there" in log_of(tmp_path / "run")
    lines, whole = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]
    assert training_numbers(lines) == training_numbers(whole)
    assert [lines[at]["eval_loss"] for at in (0, 3)] == [whole[at]["eval_loss"] for at in (0, 3)]
    told = log_of(tmp_path / "run")
    assert sum(line.startswith("evaluation before") for line in told) == 1
    assert any(line.startswith("3 steps, 1 of them in this start, in ") for line in told)
    first = next(line for line in told if line.startswith("first evaluation"))
    assert first.split()[2] == "0"  # from the metrics of the first start
    assert train(config, "checkpoint.resume=never") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize(("steps", "every"), [(3, 0), (1, 0), (1, 1), (4, 2), (5, 2), (6, 7), (7, 7), (9, 1)])
def test_plan_counts_evaluations(steps, every, folder, tmp_path):
    held_out = str(folder / "singles.jsonl")
    cfg = load_config(str(config_of(folder, tmp_path, "singles", "sft", eval={"path": held_out, "every": every})))
    due = sum(evaluation_due(cfg, step, steps) for step in range(steps + 1))
    assert evaluation_plan(cfg, steps, 8).endswith(f"; {due} in all")


def test_metrics_of_a_fresh_run_are_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "eval_loss": 1}\n', '{"step": 1}\n', '{"step": 2}\n', '{"step": 3, "lo']
    for step, kept in ((2, 3), (1, 2), (0, 0)):
        path.write_text("".join(lines))
        keep_metrics_up_to(tmp_path, step)
        assert path.read_text() == "".join(lines[:kept])


def test_rounds_tell_their_number_and_show_texts(folder, tmp_path):
    sections = round_sections(tmp_path, rounds=5, updates_per_round=2)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    assert train(config, f"eval.path={tmp_path}/prompts.jsonl", "eval.every=5") == 0
    lines = metrics(tmp_path / "run")
    assert [line["round"] for line in lines] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [line["epoch"] for line in lines] == pytest.approx([4 * line["round"] / 7 for line in lines])  # 7 prompts
    told = log_of(tmp_path / "run")
    rounds = [line for line in told if re.match(r"round \d/5: mean reward ", line)]
    assert len(rounds) == 5
    for line, numbers in zip(rounds, lines[1::2], strict=True):
        assert f"mean reward {numbers['rollout_reward_mean']:.4g} over 12 responses to 4 prompts" in line
    shown = [at for at, line in enumerate(told) if re.match(r'round \d/5, a sample: prompt "\d\+\d="', line)]
    assert [told[at].split("/")[0] for at in shown] == ["round 1", "round 4", "round 5"]
    for at in shown:
        first, second = (re.fullmatch(r'  reward (\S+): ".*"', line) for line in told[at + 1 : at + 3])
        assert first and second and float(first[1]) > float(second[1])
    step = next(line for line in told if line.startswith("step 10/10 "))
    assert " round 5/5 loss " in step and f" reward {lines[10]['reward_mean']:.3f} " in step
    assert f"evaluation after step 5: reward {lines[5]['eval_reward']:.4g} " in "\n".join(told)
    assert any(line.startswith("best evaluation (highest reward)") for line in told)


class Words:
    """A tokenizer of which every id is a letter."""

    def decode(self, ids, **options):
        return "".join(chr(96 + number) for number in ids)


def test_sample_is_of_a_group_with_different_rewards():
    def group(prompt, *responses):
        return {"prompt_ids": prompt, "responses": [{"response_ids": ids, "reward": r} for ids, r in responses]}

    equal, unequal = group([1], ([2], 1.0), ([3], 1.0)), group([4], ([5], 0.5), ([6], 0.0), ([7], 2.0))
    assert round_sample(2, 9, [equal, unequal], Words()) == (
        'round 2/9, a sample: prompt "d"\n  reward 2: "g"\n  reward 0: "f"'
    )
    assert round_sample(2, 9, [equal], Words()).endswith('prompt "a"\n  reward 1: "c"\n  reward 1: "b"')
    assert [number for number in range(1, 101) if shows_sample(number, 100)] == [*range(1, 101, 10), 100]
    assert [number for number in range(1, 3) if shows_sample(number, 2)] == [1, 2]


def test_quoted_text_is_one_line_of_bounded_length():
    assert quoted('a "b"\n\x1b[2J') == '"a \\"b\\"\\n\\u001b[2J"'
    assert quoted("x" * 400) == f'"{"x" * 400}"'
    assert quoted("x" * 500 + "end") == f'"{"x" * 240} [... 103 characters ...] {"x" * 157}end"'


def test_numbers_as_they_are_written():
    assert [clock(value) for value in (0, 59.6, 3723, 360000)] == ["0:00:00", "0:01:00", "1:02:03", "100:00:00"]
    assert [duration(value) for value in (0.04, 59, 61)] == ["0.0 s", "59.0 s", "0:01:01"]
    assert step_numbers({**STEP, "epoch": 1.234, "token_accuracy": 0.5}, rounds=0) == (
        "epoch 1.23 loss 0.1235 grad_norm 12.35 lr 0.0001 token_accuracy 0.500 1234 tok/s"
    )
    nan = float("nan")
    assert step_numbers({**STEP, "round": 3, "loss": nan, "grad_norm": nan, "reward_mean": 0.25}, rounds=7) == (
        "round 3/7 loss nan grad_norm nan lr 0.0001 reward 0.250 1234 tok/s"
    )
    times = {**STEP, "round": 3, "reward_mean": 0.25, "round_tokens_per_second": 56.7}
    assert step_numbers(times, rounds=7).endswith(" reward 0.250 1234 tok/s (57 with sampling)")
    assert evaluation_numbers({"eval_reward": 0.5, "eval_seconds": 3}) == "reward 0.5"


def test_summary_takes_the_best_and_leaves_out_what_is_not_there():
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 2.5, "seconds": 2.0, "tokens": 10, "token_accuracy": 0.25},
        {"step": 2, "loss": None, "seconds": 3.0, "tokens": 10, "eval_loss": 1.0, "eval_seconds": 0.5},
        {"step": 3, "loss": 1.5, "seconds": 5.0, "tokens": 30, "eval_loss": None, "eval_seconds": 0.5},
    ]
    assert as_text(summary_table(summary_rows(lines), title=None)).splitlines() == [
        "                               step  loss  token_accuracy",
        "first evaluation                  0     3               -",
        "best evaluation (lowest loss)     2     1               -",
        "last evaluation                   3     -               -",
        "first training step               1   2.5            0.25",
        "last training step                3   1.5               -",
    ]
    assert time_line(lines, step=3, begun_at=0, seconds=75) == (
        "3 steps in 0:01:15 (training steps 10.0 s, evaluation 1.0 s); 5 tokens/s in training steps"
    )
    assert time_line(lines, step=3, begun_at=2, seconds=7).startswith(
        "3 steps, 1 of them in this start, in 7.0 s (training steps 5.0 s, evaluation 0.5 s); 6 tokens/s"
    )
    times = [{"step": 1, "seconds": 4.0, "tokens": 8, "sampling_seconds": 3.0, "scoring_seconds": 1.0}]
    assert time_line([*times, {"step": 2, "sampling_seconds": 0.0}], step=2, begun_at=0, seconds=9) == (
        "2 steps in 9.0 s (sampling 3.0 s, scoring 1.0 s, training steps 4.0 s); 2 tokens/s in training steps"
    )
    assert summary_rows([]) == [] and time_line([], step=0, begun_at=0, seconds=1) == "0 steps in 1.0 s"


def test_terminal_shows_a_bar_with_the_numbers_and_whole_lines(tmp_path, monkeypatch):
    """On a terminal of 80 columns: said lines stand above the bar uncut, and step lines are in the log alone."""
    outer, inner = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        start_log(tmp_path, main=True)
        with Reporter(tmp_path, 2, main=True) as report:
            assert Console(stderr=True).is_terminal
            report.phase("scoring", 1, 1)
            report.begin(0)
            for step in (1, 2):
                report.step({**STEP, "step": step, "epoch": 0.5, "token_accuracy": 0.5})
                report.say("said " + "x" * 100)
            report.end()
            report.say("after the bar")
        terminal.flush()
        seen = b"".join(
            iter(lambda: os.read(outer, 4096) if select.select([outer], [], [], 0.1)[0] else b"", b"")
        ).decode()
    os.close(outer)
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", seen).replace("\r", "")
    assert text.count("said " + "x" * 100 + "\n") == 2 and "step 1/2" not in text
    end = text[text.rindex("training") :].splitlines()
    assert "2/2" in end[0] and "left 0:00:00" in end[0] and len(end[0]) <= 80
    assert end[1] == "epoch 0.50 loss 0.1235 grad_norm 12.35 lr 0.0001 token_accuracy 0.500 1234 tok/s"
    assert end[2] == "after the bar"
    assert sum(line.startswith("step ") for line in log_of(tmp_path)) == 2
    assert not any(
        isinstance(one, logging.StreamHandler) and one.stream is terminal
        for one in logging.getLogger("megalign").handlers
    )


def test_other_ranks_write_nothing(tmp_path, capfd):
    start_log(tmp_path, main=False)
    with Reporter(tmp_path, 2, main=False) as report:
        report.phase("scoring", 1, 1)
        report.begin(0)
        report.step({**STEP, "step": 1, "epoch": 0.5})
        report.evaluation({"step": 0, "eval_loss": 1.0, "eval_seconds": 0.1})
        report.warn("nothing")
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_numbers_that_json_lacks_are_null(tmp_path):
    start_log(tmp_path, main=True)
    with Reporter(tmp_path, 2, main=True) as report:
        report.step({**STEP, "step": 1, "epoch": 0.5, "loss": float("nan"), "grad_norm": float("inf")})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None and line["grad_norm"] is None


def test_numbers_under_the_bar_are_whole_where_a_line_is_printed_above(tmp_path):
    """Lines are printed unwrapped, and the bar is drawn again below them by the same settings."""
    console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=False)
    bar = StepBar(console)
    bar.begin("training", 0, 3)
    bar.show(numbers=f"{'loss 1.25 ' * 8}819 tok/s")
    console.print(Group(*bar.get_renderables()), no_wrap=True, overflow="ignore", crop=True)
    assert "819 tok/s" in console.file.getvalue()
    assert all(len(line) <= 80 for line in console.file.getvalue().splitlines())
