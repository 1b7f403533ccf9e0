"""Rounds inside a job: what is sampled, scored, known and told."""

from __future__ import annotations

import math

import pytest
from tiny_jobs import (
    digits,
    hf_logps,
    metrics,
    read_lines,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)
from transformers import AutoTokenizer

ROUND_KEYS = {
    "rollout_equal_reward_fraction", "rollout_response_length_mean", "rollout_unfinished_fraction", "rollout_seconds",
    "rollout_skipped_groups", "reward_mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    write_model(folder / "model", tokenizer=True)
    write_model(folder / "other", tokenizer=True, seed=1)
    return folder


def config_of(folder, tmp_path, source, *, loss=None, **rollout):
    return write_config(
        tmp_path,
        model={"path": str(folder / "model")},
        reference={"source": source},
        loss=loss or {"name": "gvpo"},
        **round_sections(tmp_path, **rollout),
    )


@pytest.mark.parametrize("source", ["round_start", "initial", "other"])
def test_reference_of_a_round(source, folder, tmp_path):
    """Dumped reference scores are those of the weights that were asked for, at the temperature of the rounds."""
    config = config_of(folder, tmp_path, str(folder / "other") if source == "other" else source, temperature=0.7)
    assert train(config, "run.dump_steps=[1,2,3]") == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    modes = [line["pass_mode"] for line in lines]
    assert modes[0::2] == (["known_scores"] * 2 if source == "round_start" else ["single_pass"] * 2)
    assert modes[1::2] == ["single_pass"] * 2
    for line in lines:
        assert line.keys() >= ROUND_KEYS and all(math.isfinite(line[key]) for key in ROUND_KEYS)
        assert line["groups"] == 2 and line["sequences"] == 6 and not line["pass_gap"]
    reference = folder / ("other" if source == "other" else "model")
    for step in (1, 2, 3):
        dumped = read_lines(tmp_path / "run" / "steps" / f"step_{step}.jsonl")
        same = [line["logp"] == line["reference_logp"] for line in dumped]
        # Under round_start each round's first update begins at the reference, under initial only the first round's.
        assert all(same) == (step == 1 and source != "other" or step == 3 and source == "round_start")
        if step < 3 or source != "round_start":
            one = dumped[3]
            expected = hf_logps(reference, one["prompt_ids"], one["response_ids"], temperature=0.7).sum().item()
            assert one["reference_logp"] == pytest.approx(expected, rel=1e-5)


def test_reward_is_of_the_text_and_every_prompt_has_its_turn(folder, tmp_path):
    config = config_of(folder, tmp_path, "round_start", rounds=7, updates_per_round=1)
    assert train(config, "run.dump_steps=[1,2,3,4,5,6,7]", "optimizer.lr=0") == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = {tuple(tokenizer(line["prompt"])["input_ids"]): line for line in read_lines(tmp_path / "prompts.jsonl")}
    seen = []
    for step, line in enumerate(metrics(tmp_path / "run"), start=1):
        dumped = read_lines(tmp_path / "run" / "steps" / f"step_{step}.jsonl")
        rewards = []
        for one in dumped:
            record = prompts[tuple(one["prompt_ids"])]
            text = tokenizer.decode(one["response_ids"], skip_special_tokens=True)
            rewards.append(digits(record["prompt"], text, record))
        assert line["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
        seen += [tuple(one["prompt_ids"]) for one in dumped[::3]]
    # 7 rounds x 4 prompts are 4 epochs of 7.
    assert sorted(seen) == sorted([*prompts] * 4) and len(set(seen[:7])) == 7


@pytest.mark.parametrize(
    "loss", [{"name": "grpo"}, {"name": "grpo", "beta": 0.1}, {"name": "rloo"}, {"name": "epa"}], ids=str
)
def test_other_losses_train_in_rounds(loss, folder, tmp_path):
    config = config_of(folder, tmp_path, None, loss=loss)
    assert train(config, "run.dump_steps=[1]") == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and all(line["grad_norm"] > 0 and math.isfinite(line["loss"]) for line in lines)
    if loss["name"] == "grpo":  # on policy the ratio is 1 up to the sampler's rounding
        assert lines[0]["clip_fraction"] == 0 and lines[0]["loss"] == pytest.approx(0, abs=1e-5)


def test_held_out_prompts_are_answered_greedily(folder, tmp_path):
    config = config_of(folder, tmp_path, "round_start")
    held_out = write_lines(tmp_path / "held_out.jsonl", [{"prompt": f"{n}=", "bonus": n} for n in range(3)])
    assert train(config, f"eval.path={held_out}", "eval.every=2", "optimizer.lr=0") == 0
    lines = metrics(tmp_path / "run")
    assert ["eval_reward" in line for line in lines] == [True, False, True, False, True]
    from transformers import AutoModelForCausalLM

    model, tokenizer = (cls.from_pretrained(folder / "model") for cls in (AutoModelForCausalLM, AutoTokenizer))
    rewards = []
    for record in read_lines(held_out):
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)[0, ids.shape[1] :]
        rewards.append(digits(record["prompt"], tokenizer.decode(out, skip_special_tokens=True), record))
    assert [lines[step]["eval_reward"] for step in (0, 2, 4)] == pytest.approx([sum(rewards) / 3] * 3)


def refuse(prompt, response, record):
    from megalign.schema import UserError

    raise UserError("bonus is 3: must be even")


def test_reward_that_refuses_its_record(folder, tmp_path, capfd):
    assert train(config_of(folder, tmp_path, "initial", reward="test_round_jobs:refuse")) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign")]
    assert len(told) == 1 and "prompts.jsonl:" in told[0] and told[0].endswith("bonus is 3: must be even")
    assert status(tmp_path / "run")["code"] == 2
