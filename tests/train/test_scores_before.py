"""What is scored before the first step, and on the side: references, teachers, filters, held-out records, trackers."""

from __future__ import annotations

import math
import re

import pytest

from tests.support.tiny_jobs import (
    CHARACTERS,
    NOW,
    hf_logps,
    metrics,
    numbers,
    read_lines,
    records,
    train,
    write_config,
    write_lines,
    write_model,
    write_tokenizer,
)

TEXTS = [
    {"messages": [{"role": "user", "content": f"{n}+1="}, {"role": "assistant", "content": str(n + 1) * (1 + n % 3)}]}
    for n in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    write_model(folder / "model", tokenizer=True)
    write_model(folder / "other", seed=1)
    write_model(folder / "teacher", seed=2, vocab_size=47, hidden_size=16)
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['role'][:1] + m['content'] + '<eos>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>a{% endif %}"
    write_tokenizer(folder / "teacher", characters=CHARACTERS[::-1], template=template)
    write_lines(folder / "samples.jsonl", records("samples"))
    write_lines(folder / "texts.jsonl", TEXTS)
    return folder


def config_of(folder, tmp_path, records, **changes):
    changes["data"] = {"path": str(folder / records), **changes.get("data", {})}
    return write_config(tmp_path, **{"model": {"path": str(folder / "model")}, **changes})


@pytest.mark.parametrize("source", ["initial", "round_start", "other"])
def test_reference_of_a_data_set_stays_the_same(source, folder, tmp_path):
    config = config_of(folder, tmp_path, "samples.jsonl", run={"steps": 4, "dump_steps": [1, 4]})
    named = str(folder / source) if source == "other" else source
    assert train(config, f"reference.source={named}") == 0
    assert metrics(tmp_path / "run")[0]["pass_mode"] == ("single_pass" if source == "other" else "known_scores")
    for step in (1, 4):
        for one in read_lines(tmp_path / "run" / "steps" / f"step_{step}.jsonl")[::3]:
            scored_by = folder / ("other" if source == "other" else "model")
            expected = hf_logps(scored_by, one["prompt_ids"], one["response_ids"]).sum().item()
            assert one["reference_logp"] == pytest.approx(expected, rel=1e-5)
            policy = hf_logps(folder / "model", one["prompt_ids"], one["response_ids"]).sum().item()
            assert (one["logp"] == pytest.approx(policy, rel=1e-5)) == (step == 1)


def teacher_means(folder):
    """Mean log-prob by response token of each text under the teacher, its ids spelt out by hand."""
    number = {character: 4 + place for place, character in enumerate(CHARACTERS[::-1])}
    means = []
    for record in TEXTS:
        question, answer = (turn["content"] for turn in record["messages"])
        prompt = [2, number["u"], *(number[c] for c in question), 0, 3, number["a"]]
        means.append(hf_logps(folder / "teacher", prompt, [*(number[c] for c in answer), 0]).mean().item())
    return means


POFT = {"loss": {"name": "poft"}, "run": {"steps": 1, "dump_steps": [1]}, "data": {"groups_per_step": 6}}


def policy_means(lines):
    return [line["logp"] / len(line["response_ids"]) for line in sorted(lines, key=lambda line: line["record"])]


def test_teacher_reads_with_its_own_tokenizer_and_template(folder, tmp_path):
    config = config_of(folder, tmp_path, "texts.jsonl", **POFT)
    assert train(config, f"teachers=[{{name: t, path: {folder}/teacher}}]") == 0
    line = metrics(tmp_path / "run")[0]
    policy = policy_means(read_lines(tmp_path / "run" / "steps" / "step_1.jsonl"))
    gaps = [own - teacher for own, teacher in zip(policy, teacher_means(folder), strict=True)]
    assert line["teacher_margin"] == pytest.approx(sum(gaps) / 6, rel=1e-5)
    assert line["loss"] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 6, rel=1e-5)


def test_records_bring_scores_and_teachers_fill_in_the_rest(folder, tmp_path):
    """Half of the records know t's score; u, which no teacher of the job is, counts for nothing."""
    known = {place: -0.25 * place for place in (1, 3, 5)}
    half = [
        {**record, "teacher_scores": {"t": known[place], "u": -50.0}} if place in known else record
        for place, record in enumerate(TEXTS)
    ]
    data = write_lines(tmp_path / "half.jsonl", half)
    config = config_of(folder, tmp_path, "texts.jsonl", **POFT)
    assert train(config, f"teachers=[{{name: t, path: {folder}/teacher}}]", f"data.path={data}") == 0
    assert "scoring 3 responses with teacher t" in (tmp_path / "run" / "log.txt").read_text()
    policy = policy_means(read_lines(tmp_path / "run" / "steps" / "step_1.jsonl"))
    means = [known.get(place, mean) for place, mean in enumerate(teacher_means(folder))]
    expected = sum(own - mean for own, mean in zip(policy, means, strict=True)) / 6
    assert metrics(tmp_path / "run")[0]["teacher_margin"] == pytest.approx(expected, rel=1e-5)


def test_teacher_of_the_same_words_scores_ids(folder, tmp_path):
    config = config_of(folder, tmp_path, "singles.jsonl", **POFT)
    write_lines(folder / "singles.jsonl", records("singles", 6))
    assert train(config, f"teachers=[{{name: t, path: {folder}/other}}]", f"model.path={folder}/other") == 0
    assert metrics(tmp_path / "run")[0]["teacher_margin"] == pytest.approx(0, abs=1e-6)
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_filter_keeps_what_teachers_prefer_and_leaves_held_out_records_alone(folder, tmp_path):
    data = write_lines(tmp_path / "scored.jsonl", records("scored", 10))
    config = config_of(
        folder, tmp_path, "texts.jsonl", loss={"name": "poft"}, run={"steps": 4, "dump_steps": [1, 2, 3, 4]}
    )
    more = [f"data.path={data}", "data.groups_per_step=2", "data.filter.teacher_score_keep=0.8", f"eval.path={data}"]
    assert train(config, *more, "eval.every=1", "optimizer.lr=0") == 0
    means = [sum(record["teacher_scores"].values()) / 2 for record in read_lines(data)]
    steps = [read_lines(path) for path in sorted((tmp_path / "run" / "steps").iterdir())]
    assert sorted(line["record"] for step in steps for line in step) == sorted(
        sorted(range(10), key=lambda place: means[place])[2:]
    )
    gaps = [
        hf_logps(folder / "model", record["prompt_ids"], record["response_ids"]).mean().item() - mean
        for record, mean in zip(read_lines(data), means, strict=True)
    ]
    held_out = sum(math.log1p(math.exp(-gap)) for gap in gaps) / 10
    assert [line["eval_loss"] for line in metrics(tmp_path / "run")] == pytest.approx([held_out] * 5, rel=1e-5)


def test_held_out_loss_is_that_of_the_exported_weights(folder, tmp_path):
    """GVPO by its definition, from transformers' log-probs of the trained and of the initial checkpoint."""
    held_out = write_lines(tmp_path / "held_out.jsonl", records("samples", 5))
    config = config_of(folder, tmp_path, "samples.jsonl", eval={"path": str(held_out), "every": 2})
    assert train(config, "run.steps=4", f"export.hf_dir={tmp_path}/out", "trackers=[tensorboard]") == 0
    lines = metrics(tmp_path / "run")
    assert ["eval_loss" in line for line in lines] == [True, False, True, False, True]
    total = 0.0
    for record in read_lines(held_out):
        gaps = []
        for response in record["responses"]:
            after, before = (
                hf_logps(path, record["prompt_ids"], response["response_ids"]).sum().item()
                for path in (tmp_path / "out", folder / "model")
            )
            gaps.append(0.1 * (after - before) - response["reward"])
        mean = sum(gaps) / len(gaps)
        total += sum((gap - mean) ** 2 for gap in gaps) / 2 / (len(gaps) - 1)
    assert lines[4]["eval_loss"] == pytest.approx(total / 5, rel=1e-5)
    _check_tensorboard(tmp_path / "run" / "tensorboard", lines)


def _check_tensorboard(folder, lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines[1:]]
    evaluated = [(event.step, event.value) for event in events.Scalars("eval_loss")]
    assert evaluated == [(step, pytest.approx(lines[step]["eval_loss"], rel=1e-6)) for step in (0, 2, 4)]
    assert {"epoch", "grad_norm", "lr", "eval_loss", "reward_mean"} <= set(events.Tags()["scalars"])


# what a resumed run scores


@pytest.mark.parametrize(("source", "shuffle"), [("initial", False), ("other", True)])
def test_a_resumed_run_scores_what_its_steps_need(source, shuffle, folder, tmp_path):
    """Bitwise what it would have scored: the batches in which the needed sequences come first, and no others."""
    config = config_of(
        folder,
        tmp_path,
        "samples.jsonl",
        run={"steps": 5},  # of two of eight records: the last one begins a second epoch
        data={"groups_per_step": 2, "shuffle": shuffle},
        loss={"name": "grpo", "beta": 0.1},
        checkpoint={"every": 1, "keep": 9},
    )
    named = f"reference.source={folder / source}" if source == "other" else "reference.source=initial"
    assert train(config, named, f"run.dir={tmp_path}/whole") == 0
    for after in (1, 3, 4, 5):
        run = tmp_path / f"from_{after}"
        resume = f"checkpoint.resume={tmp_path}/whole/checkpoints/step_0000000{after}"
        assert train(config, named, f"run.dir={run}", resume) == 0
        log = (run / "log.txt").read_text()
        name = "scoring reference" if source == "other" else "scoring initial policy"
        told = re.search(rf"{name}: (\d+) of (\d+) sequences, for the steps after {after}", log)
        assert told is not None
        # Records have 2, 3, 4, 5, 2, 3, 4 and 5 responses, 28 in all; unshuffled, the fifth step takes the first two.
        if not shuffle:
            assert told[1] == str({1: 28, 3: 4 + 5 + 2 + 3, 4: 2 + 3, 5: 0}[after])
        assert told[2] == "28" and (int(told[1]) < 28 or after == 1)
        if after < 5:
            assert numbers(metrics(run)) == numbers(metrics(tmp_path / "whole"))[after:]
        else:
            assert not (run / "metrics.jsonl").exists()


def test_a_resumed_run_evaluates_and_asks_teachers_only_where_it_must(folder, tmp_path):
    config = config_of(
        folder,
        tmp_path,
        "texts.jsonl",
        loss={"name": "poft"},
        run={"steps": 3},
        data={"groups_per_step": 1, "shuffle": False},
        eval={"path": str(folder / "texts.jsonl"), "every": 2},
    )
    teacher = f"teachers=[{{name: t, path: {folder}/teacher}}]"
    write_lines(folder / "texts.jsonl", TEXTS)
    assert train(config, teacher, f"run.dir={tmp_path}/whole") == 0
    assert train(config, teacher, NOW) == 75
    assert train(config, teacher) == 0
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))
    assert train(config, teacher) == 0  # no step is left, and nothing to evaluate
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "scoring 0 of 6 responses with teacher t" in log
    assert log.count("held-out data:") == 2


def test_a_filter_needs_every_teacher_score(folder, tmp_path):
    config = config_of(
        folder, tmp_path, "texts.jsonl", loss={"name": "poft"}, run={"steps": 3}, data={"groups_per_step": 1}
    )
    both = [f"teachers=[{{name: t, path: {folder}/teacher}}]", "data.filter.teacher_score_keep=0.5"]
    assert train(config, *both, f"run.dir={tmp_path}/whole") == 0
    assert [train(config, *both, NOW) for _ in range(3)] == [75, 75, 0]
    assert numbers(metrics(tmp_path / "run")) == numbers(metrics(tmp_path / "whole"))
    assert (tmp_path / "run" / "log.txt").read_text().count("scoring 6 responses with teacher t") == 3
