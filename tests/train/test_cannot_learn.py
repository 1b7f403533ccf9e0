"""Training that cannot learn says so, once and with numbers; training that can says nothing."""

from __future__ import annotations

import re

import pytest

from megalign.data.group import Response, TokenSequence
from megalign.engines.step import StepBatch
from megalign.train.cannot_learn import Doubts, doubts_about_rate
from tests.support.tiny_jobs import metrics, records, round_sections, train, write_config, write_lines, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doubts")
    write_model(folder / "model", tokenizer=True)
    return folder


def warnings_of(run_dir):
    found = [re.search(r"warning: (.*)", line) for line in (run_dir / "log.txt").read_text().splitlines()]
    return [match[1] for match in found if match]


def equal(group, reward=0.5):
    return {**group, "responses": [{**one, "reward": reward} for one in group["responses"]]}


def same(record):
    return {**record, "rejected_ids": record["chosen_ids"]}


def alike(group):
    """All responses are the first's tokens; their rewards stay."""
    ids = group["responses"][0]["response_ids"]
    return {**group, "responses": [{**one, "response_ids": ids} for one in group["responses"]]}


def cut(group, count):
    """The first `count` responses are marked as cut, the others as whole."""
    return {
        **group, "responses": [{**one, "finished": at >= count} for at, one in enumerate(group["responses"])],
    }  # fmt: skip


SAMPLES, PAIRS = records("samples"), records("pairs")
LONGEST = max(len(one["prompt_ids"] + response["response_ids"]) for one in SAMPLES for response in one["responses"])
NUM_SAMPLES = sum(len(one["responses"]) for one in SAMPLES)
NUM_LONGEST = sum(
    len(one["prompt_ids"] + response["response_ids"]) == LONGEST for one in SAMPLES for response in one["responses"]
)

# name: records, loss, overrides, and for each warning what it must hold.
FILES = {
    "nothing is wrong": (SAMPLES, "gvpo", [], []),
    "nothing is wrong with pairs": (PAIRS, "dpo", ["data.groups_per_step=8"], []),
    "rate of zero": (SAMPLES, "gvpo", ["optimizer.lr=0"], [["optimizer.lr is 0"]]),
    "rate that begins at its end": (
        SAMPLES, "gvpo", ["run.steps=1", "optimizer.schedule.name=cosine"],
        [["learning rate is 0 at each of the 1 steps", "cosine", "min_lr 0"]],
    ),
    "warm-up longer than the run": (
        SAMPLES, "gvpo", ["optimizer.schedule.warmup_steps=12"],
        [["warmup_steps is 12", "3 steps", "to 0.00025 (optimizer.lr: 0.001); set warmup_steps below 3"]],
    ),
    "step above the number of groups": (
        SAMPLES, "gvpo", ["data.groups_per_step=9"], [["data.groups_per_step is 9", "8 groups", "more than once"]],
    ),
    "budget below a sequence": (
        SAMPLES, "gvpo", [f"data.tokens_per_micro_batch={LONGEST - 1}"],
        [[f"tokens_per_micro_batch is {LONGEST - 1}", f"{NUM_LONGEST} of {NUM_SAMPLES} sequences",
          f"{LONGEST} tokens"]],
    ),
    "most responses cut": (
        [cut(one, 2) for one in SAMPLES], "gvpo", [],
        [[f"{sum(min(2, len(one['responses'])) for one in SAMPLES)} of {NUM_SAMPLES} responses", "finished is false"]],
    ),
    "some responses cut": ([cut(one, 1) for one in SAMPLES], "gvpo", [], []),
    "equal rewards": (
        [equal(one) for one in SAMPLES], "gvpo", [],
        [["equal in 8 of 8 records", f"all 0.5 over {NUM_SAMPLES} responses"]],
    ),
    "equal rewards in most groups": (
        [equal(one, reward) for reward, one in enumerate(SAMPLES[:5])] + SAMPLES[5:], "grpo", [],
        [["equal in 5 of 8 records", "0 to 4 over"]],
    ),
    "equal rewards in some groups": ([equal(one) for one in SAMPLES[:3]] + SAMPLES[3:], "rloo", [], []),
    "chosen equal to rejected": (
        [same(one) for one in PAIRS], "dpo", ["data.groups_per_step=8"],
        [["8 of 8 records", "same tokens as preferred and other", "data.jsonl:1", "gradient is 0"]],
    ),
    "positive equal to its negatives": (
        [same(one) for one in PAIRS], "epa", ["loss.weak=0"], [["8 of 8 records", "gradient is 0"]],
    ),
    "positive equal to its own negatives": (
        [same(one) for one in PAIRS], "epa", ["loss.weak=1"], [["8 of 8 records", "nothing to tell apart"]],
    ),
    "one chosen equal to rejected": (
        [*PAIRS[:4], same(PAIRS[4]), *PAIRS[5:]], "dpo", [], [["1 of 8 records", "data.jsonl:5"]],
    ),
    "responses all the same": (
        [*SAMPLES[:2], alike(SAMPLES[2]), *SAMPLES[3:]], "gvpo", [],
        [["1 of 8 records", "same tokens as responses", "data.jsonl:3"]],
    ),
    "same best and worst by reward": (
        [*SAMPLES[:6], alike(SAMPLES[6]), SAMPLES[7]], "dpo", [], [["1 of 8 records", "data.jsonl:7"]],
    ),
    "equal rewards where others' responses are negatives": (
        [equal(one) for one in SAMPLES], "epa", [],
        [["equal in 8 of 8 records", f"all 0.5 over {NUM_SAMPLES} responses", "first response", "other prompts"]],
    ),
    "equal rewards in some groups of EPA": ([equal(one) for one in SAMPLES[:3]] + SAMPLES[3:], "epa", [], []),
    "single steps of equal rewards": (
        [equal(one) for one in SAMPLES[:3]] + SAMPLES[3:], "grpo", ["data.groups_per_step=1", "run.steps=8"], [],
    ),
    "one record": (
        PAIRS[:1], "dpo", [], [["data.groups_per_step is 3 and an epoch has 1 group:"]],
    ),
    "most records skipped": (
        [*PAIRS[:3], *({**one, "chosen_ids": [1] * 40} for one in PAIRS[3:])], "dpo", ["data.on_bad_record=skip"],
        [["5 of 8 records are skipped", "too long (5)", "data.jsonl:4", "must be at most 32"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_doubts_about_files(name, folder, tmp_path, capfd):
    lines, loss, overrides, wanted = FILES[name]
    write_lines(tmp_path / "data.jsonl", lines)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, loss={"name": loss})
    assert train(config, *overrides) == 0
    found = warnings_of(tmp_path / "run")
    assert len(found) == len(wanted), found
    for warning, words in zip(found, wanted, strict=True):
        assert all(word in warning for word in words), warning
    seen = capfd.readouterr().err
    assert all(seen.count(f"warning: {warning}") == 1 for warning in found)


@pytest.mark.parametrize("num_seen", [4, 5])
def test_held_out_records_that_are_trained_on_are_counted(num_seen, folder, tmp_path):
    write_lines(tmp_path / "data.jsonl", PAIRS)
    others = [{**one, "chosen_ids": [*one["chosen_ids"], 1]} for one in PAIRS[num_seen:]]
    write_lines(tmp_path / "held_out.jsonl", [*PAIRS[:num_seen], *others])
    config = write_config(tmp_path, model={"path": str(folder / "model")}, loss={"name": "dpo"})
    assert train(config, f"eval.path={tmp_path}/held_out.jsonl") == 0
    found = warnings_of(tmp_path / "run")
    assert len(found) == (num_seen == 5)
    assert all("5 of 8 held-out records of eval.path are also trained on" in warning for warning in found)


def test_held_out_prompts_that_are_sampled_from_are_counted(folder, tmp_path):
    sections = round_sections(tmp_path, rounds=1)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    assert train(config, f"eval.path={tmp_path}/prompts.jsonl", "rollout.max_new_tokens=6") == 0
    found = [one for one in warnings_of(tmp_path / "run") if "held-out" in one]
    assert len(found) == 1 and "7 of 7 held-out prompts" in found[0]


def always_one(prompt, response, record):
    return 1.0


def by_prompt(prompt, response, record):
    """The same for every response to a prompt."""
    return float(record["bonus"])


@pytest.mark.parametrize("loss", [{"name": "gvpo"}, {"name": "grpo"}, {"name": "rloo"}], ids=str)
def test_rounds_of_equal_rewards_go_on_and_say_so_once(loss, folder, tmp_path):
    sections = round_sections(tmp_path, reward="tests.train.test_cannot_learn:always_one")
    config = write_config(tmp_path, model={"path": str(folder / "model")}, loss=loss, **sections)
    assert train(config, "rollout.max_new_tokens=6") == 0
    found = [one for one in warnings_of(tmp_path / "run") if "equal" in one]
    assert len(found) == 1 and "all 4 groups of round 1 (all 1 over 12 responses)" in found[0]
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and all(line["rollout_equal_reward_fraction"] == 1 for line in lines)
    assert loss["name"] == "rloo" or all(line["grad_norm"] == 0 for line in lines)


def test_rounds_say_what_is_cut_and_what_is_repeated(folder, tmp_path):
    """Random weights end hardly any response within two tokens, and the rewards of a prompt are told apart."""
    sections = round_sections(tmp_path, prompts_per_round=9, updates_per_round=1, max_new_tokens=2)
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    overrides = [
        "data.groups_per_step=10",
        "data.tokens_per_micro_batch=5",
        "rollout.reward=tests.train.test_cannot_learn:by_prompt",
    ]
    assert train(config, *overrides) == 0
    found = warnings_of(tmp_path / "run")
    assert len(found) == 5
    for warning, words in zip(
        found,
        [
            ["data.groups_per_step is 10", "a round has 9 groups"],
            ["rollout.prompts_per_round is 9", "rollout.path has 7 prompts"],
            ["tokens_per_micro_batch is 5", "7 of 7 prompts with rollout.max_new_tokens", "up to 6 tokens"],
            ["all 9 groups of round 1", "over 27 responses", " to "],
            ["of 27 responses of round 1 are cut at rollout.max_new_tokens 2"],
        ],
        strict=True,
    ):
        assert all(word in warning for word in words), warning
    cut = re.match(r"(\d+) of 27", found[4])
    assert cut and int(cut[1]) / 27 == pytest.approx(metrics(tmp_path / "run")[0]["rollout_unfinished_fraction"])


def test_rounds_say_which_groups_have_no_use():
    """A loss that needs a best and a worst response leaves out the groups that have none."""
    cfg = config_of_rounds("dpo")
    records = [
        {"responses": [{"response_ids": [1], "reward": first}, {"response_ids": [2], "reward": 0.0}]}
        for first in (0.0, 0.0, 1.0)
    ]
    doubts = Doubts(cfg)
    found = doubts.of_round(2, records, {"rollout_skipped_groups": 2.0, "rollout_unfinished_fraction": 0.5})
    assert found == ["loss dpo has no use for 2 of 3 groups of round 2, and its steps take the other 1 more than once"]
    assert doubts.of_round(3, records, {"rollout_skipped_groups": 2.0}) == []


def test_equal_responses_are_counted_beside_equal_rewards():
    records = [
        {"responses": [{"response_ids": [1], "reward": 0.0}, {"response_ids": [second], "reward": 0.0}]}
        for second in (1, 1, 2)
    ]
    found = Doubts(config_of_rounds("gvpo")).of_round(1, records, {})
    assert len(found) == 1 and found[0].endswith("; in 2 groups all 2 responses are the same")


def config_of_rounds(loss):
    from megalign.config.job import JobConfig

    return JobConfig.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": "model"},
            "data": {"max_length": 8, "tokens_per_micro_batch": 8},
            "loss": {"name": loss},
            "rollout": {
                "path": "prompts", "rounds": 2, "prompts_per_round": 3, "k": 2, "max_new_tokens": 2,
                "updates_per_round": 1, "reward": "exact_match",
            },
            "optimizer": {"lr": 1e-3},
        }
    )  # fmt: skip


def test_a_step_whose_groups_are_equal_by_chance_raises_no_doubt():
    """Steps of few groups meet it in healthy runs; it explains a gradient of zero, too."""
    doubts = Doubts(config_of_rounds("gvpo"))
    for norm in (0.5, 0.0):
        sequences = [TokenSequence(0, group, "response", (1,), Response((2,), float(group))) for group in (0, 1)]
        assert doubts.of_step(1, StepBatch([*sequences, *sequences], 2), norm) == []


def test_a_gradient_of_zero_is_said_once():
    doubts = Doubts(config_of_rounds("gvpo"))
    responses = [Response((2,), 0.0), Response((3,), 1.0)]
    batch = StepBatch([TokenSequence(0, 0, "response", (1,), one) for one in responses], 1)
    assert doubts.of_step(3, batch, 1e-9) == doubts.of_step(4, batch, float("nan")) == []
    assert doubts.of_step(5, batch, 0.0) == [
        "step 5: the gradient norm is exactly 0 over 2 sequences, so the loss moves no weight"
    ]
    assert doubts.of_step(6, batch, 0.0) == []


def rate_doubts(steps, **schedule):
    return list(
        doubts_about_rate(config_of_rounds("gvpo").model_copy(update={"optimizer": optimizer(**schedule)}), steps)
    )


def optimizer(**schedule):
    from megalign.config.sections import OptimizerSection

    return OptimizerSection(lr=1e-3, schedule=schedule)


def test_rates_that_are_in_order_raise_no_doubt():
    assert rate_doubts(1) == rate_doubts(2, name="cosine") == rate_doubts(3, warmup_steps=2) == []
    assert rate_doubts(1, name="linear", min_lr=1e-4) == []
    assert "is 3 and the run has 3 steps" in rate_doubts(3, warmup_steps=3)[0]
    assert len(rate_doubts(1, name="linear")) == 1


def test_every_record_skipped_is_one_line_with_numbers(folder, tmp_path, capfd):
    write_lines(tmp_path / "data.jsonl", [{**one, "chosen_ids": [1] * 40} for one in PAIRS])
    config = write_config(tmp_path, model={"path": str(folder / "model")}, loss={"name": "dpo"})
    assert train(config, "data.on_bad_record=skip") == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign: error:")]
    assert len(told) == 1 and "data.jsonl:1" in told[0] and "0 of 8 records kept; skipped: too long 8" in told[0]
