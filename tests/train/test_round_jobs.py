"""Rounds inside a job: what is sampled, scored, known and told."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.tiny_jobs import (
    NOW,
    digits,
    hf_logps,
    metrics,
    numbers,
    read_lines,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

ROUND_KEYS = {
    "rollout_equal_reward_fraction", "rollout_response_length_mean", "rollout_unfinished_fraction", "rollout_seconds",
    "rollout_skipped_groups", "reward_mean", "rollout_mismatch", "rollout_mismatch_max", "seconds",
    "round_seconds", "sampling_seconds", "scoring_seconds", "round_tokens_per_second",
}  # fmt: skip
MISMATCH = {"rollout_mismatch", "rollout_mismatch_max"}
OLD_LOSSES = {
    "grpo": {"name": "grpo"},
    "grpo with a reference": {"name": "grpo", "beta": 0.1},
    "dr_grpo": {"name": "grpo", "variant": "dr_grpo", "max_response_length": 40},
    "dapo": {"name": "grpo", "variant": "dapo"},
    "rloo": {"name": "rloo"},
}


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
    for number, line in enumerate(lines):
        # Later updates are compared with the sampler where the policy of the round's start scored them.
        keys = ROUND_KEYS if source == "round_start" or number % 2 == 0 else ROUND_KEYS - MISMATCH
        assert line.keys() >= keys and all(math.isfinite(line[key]) for key in keys)
        assert MISMATCH & line.keys() <= keys and line.get("rollout_mismatch_max", 0.0) < 1e-4
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


@pytest.mark.parametrize("source", ["initial", "round_start"])
@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("loss", OLD_LOSSES)
def test_an_unchanged_policy_is_the_old_one_in_bf16(loss, updates, source, folder, tmp_path):
    """With rate 0 nothing is clipped, and old, policy and reference agree to the bit, unlike the sampler."""
    sizes = {"prompts_per_round": 6, "max_new_tokens": 40, "temperature": 1.3}
    config = config_of(folder, tmp_path, source, loss=OLD_LOSSES[loss], updates_per_round=updates, **sizes)
    more = ["run.dtype=bf16", "optimizer.lr=0", "data.max_length=64", f"run.dump_steps={[*range(1, 2 * updates + 1)]}"]
    assert train(config, *more) == 0
    lines = metrics(tmp_path / "run")
    knows = updates > 1 or (source == "round_start" and loss in ("rloo", "grpo with a reference"))
    for number, line in enumerate(lines):
        assert line["clip_fraction"] == 0.0 and line.get("kl", 0.0) == 0.0
        assert 1e-4 < line["rollout_mismatch"] < line["rollout_mismatch_max"] < 0.5
        assert (line["pass_mode"] == "known_scores") == (knows and number % updates == 0)
        _check_advantages(_dumped(tmp_path, number + 1), OLD_LOSSES[loss], tmp_path, folder)


def _check_advantages(lines, loss, tmp_path, folder):
    """With a ratio of exactly 1 a coefficient is the advantage by its weight alone, whatever the log-probs are."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    bonus = {line["prompt"]: line for line in read_lines(tmp_path / "prompts.jsonl")}
    groups = {}
    for line in lines:
        prompt = tokenizer.decode(line["prompt_ids"], skip_special_tokens=True)
        text = tokenizer.decode(line["response_ids"], skip_special_tokens=True)
        groups.setdefault(line["group"], []).append((digits(prompt, text, bonus[prompt]), line))
    tokens = sum(len(line["response_ids"]) for line in lines)
    for group in groups.values():
        rewards = [reward for reward, _ in group]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) + 1e-4
        for reward, line in group:
            centred, length, share = reward - mean, len(line["response_ids"]), 1 / (len(groups) * len(group))
            wanted = {
                "grpo": -centred / deviation * share / length,
                "dr_grpo": -centred * share / 40,
                "dapo": -centred / deviation / tokens,
                "rloo": -centred * len(group) / (len(group) - 1) * share,
            }[loss.get("variant", loss["name"])]
            assert line["coefficient"] == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("loss", ["grpo", "rloo"])
def test_bf16_gradient_of_a_first_update(loss, folder, tmp_path):
    """The gradient's norm is that of advantage-weighted log-probs in float64, within what bf16 can say."""
    config = config_of(folder, tmp_path, None, loss=OLD_LOSSES[loss], updates_per_round=1, max_new_tokens=20, rounds=1)
    assert train(config, "run.dtype=bf16", "optimizer.lr=0", "data.max_length=40", "run.dump_steps=[1]") == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).double()
    total = torch.zeros((), dtype=torch.float64)
    for line in read_lines(tmp_path / "run" / "steps" / "step_1.jsonl"):
        ids = torch.tensor([[*line["prompt_ids"], *line["response_ids"]]])
        rows = model(ids).logits[0].double().log_softmax(-1)[len(line["prompt_ids"]) - 1 : -1]
        logp = rows.gather(1, torch.tensor(line["response_ids"])[:, None]).sum()
        total = total + line["coefficient"] * logp  # of GRPO the mean coefficient of tokens that all have the same
    gradients = torch.autograd.grad(total, [one for one in model.parameters() if one.requires_grad])
    norm = math.sqrt(sum(float(one.square().sum()) for one in gradients))
    assert metrics(tmp_path / "run")[0]["grad_norm"] == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize("loss", ["grpo with a reference", "rloo"])
def test_a_round_goes_on_with_its_old_scores(loss, folder, tmp_path):
    """Stopped after every step, in the middle of rounds too, the job takes the steps of one that was not."""
    config = config_of(folder, tmp_path, "initial", loss=OLD_LOSSES[loss], updates_per_round=4)
    assert train(config, f"run.dir={tmp_path}/whole") == 0
    for _ in range(7):
        assert train(config, NOW) == 75
    assert train(config, NOW) == 0
    whole, stepwise = (metrics(tmp_path / name) for name in ("whole", "run"))
    assert len(whole) == 8 and numbers(whole) == numbers(stepwise)
    for line, before in zip(stepwise[1:], stepwise[:-1]):
        fresh = line["step"] % 4 == 1
        assert fresh or line["round_seconds"] > before["round_seconds"]
        assert (line["sampling_seconds"] > 0) == fresh == (line["scoring_seconds"] > 0)


def test_times_of_a_round_add_up(folder, tmp_path):
    config = config_of(folder, tmp_path, "round_start")
    assert train(config) == 0
    for first, second in zip(*[iter(metrics(tmp_path / "run"))] * 2):
        parts = first["sampling_seconds"] + first["scoring_seconds"] + first["seconds"]
        assert first["rollout_seconds"] <= first["sampling_seconds"]
        assert parts <= first["round_seconds"] <= second["round_seconds"] - second["seconds"]
        assert second["sampling_seconds"] == second["scoring_seconds"] == 0
        done = second["round_tokens_per_second"] * second["round_seconds"]
        assert done == pytest.approx(first["tokens"] + second["tokens"])
        assert second["tokens_per_second"] == pytest.approx(second["tokens"] / second["seconds"])


def test_bad_prompts_are_skipped_where_the_job_says_so(folder, tmp_path):
    config = config_of(folder, tmp_path, "round_start", rounds=7, updates_per_round=1, prompts_per_round=2)
    good = read_lines(tmp_path / "prompts.jsonl")
    bad = [{"question": "1+1="}, {"prompt": ""}, {"prompt_ids": [9999]}, {"prompt": "1" * 40, "bonus": 0}]
    write_lines(tmp_path / "prompts.jsonl", [bad[0], *good, *bad[1:]])
    write_lines(tmp_path / "held_out.jsonl", [{"prompt": 7}, {"prompt": "1=", "bonus": 1}])
    more = [f"eval.path={tmp_path}/held_out.jsonl", "eval.every=7", "run.dump_steps=[1,2,3,4,5,6,7]"]
    assert train(config, *more) == 2
    assert "prompts.jsonl:1: " in status(tmp_path / "run")["reason"]
    assert train(config, *more, "data.on_bad_record=skip") == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "prompts: 7 of 11 records kept; skipped: " in log and "the first problem: " in log
    assert "held-out prompts: 1 of 2 records kept; skipped: wrong type 1" in log
    seen = [line["prompt_ids"] for step in range(1, 8) for line in _dumped(tmp_path, step)[::3]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert sorted(map(tokenizer.decode, seen)) == sorted([line["prompt"] for line in good] * 2)
    write_lines(tmp_path / "prompts.jsonl", bad)
    assert train(config, *more, "data.on_bad_record=skip", f"run.dir={tmp_path}/none") == 2
    assert "no record of rollout.path is usable" in status(tmp_path / "none")["reason"]


def _dumped(folder, step):
    return read_lines(folder / "run" / "steps" / f"step_{step}.jsonl")


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
    assert train(config_of(folder, tmp_path, "initial", reward="tests.train.test_round_jobs:refuse")) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign")]
    assert len(told) == 1 and "prompts.jsonl:" in told[0] and told[0].endswith("bonus is 3: must be even")
    assert status(tmp_path / "run")["code"] == 2


def leave(prompt, response, record):
    raise SystemExit(0)


def hang(prompt, response, record):
    while record["bonus"] > 0.5:
        pass
    return 0.0


def fail(prompt, response, record):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("leave", "raised SystemExit: 0 (test_round_jobs.py line"),
        ("hang", "did not return in 1 s"),
        ("fail", "raised ValueError: two lines (test_round_jobs.py line"),
    ],
)
def test_reward_that_does_not_return_a_number(name, told, folder, tmp_path, capfd):
    config = config_of(
        folder, tmp_path, "initial", reward=f"tests.train.test_round_jobs:{name}", prompts_per_round=7, rounds=1
    )
    assert train(config, "watchdog.timeout_s=2", "data.groups_per_step=1", "rollout.updates_per_round=1") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megalign")]
    assert len(lines) == 1 and "prompts.jsonl:" in lines[0]
    assert f": reward 'tests.train.test_round_jobs:{name}' {told}" in lines[0]
    assert status(tmp_path / "run")["code"] == 2 and status(tmp_path / "run")["reason"] in lines[0]
