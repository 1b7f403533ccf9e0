"""Rounds: the same groups for any number of ranks, in the format `data.path` takes, and prompts in a known order."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megalign.config.job import JobConfig
from megalign.data.config import DataConfig
from megalign.data.dataset import load_dataset
from megalign.data.group import Pairing
from megalign.rollout.collect import rollout_round, write_groups
from megalign.rollout.command import write_rollouts
from megalign.rollout.prompts import load_prompts, round_prompts
from megalign.rollout.rewards import Reward, choose_reward
from megalign.rollout.sampler import Sampled, SamplingPlan
from megalign.rollout.transformers_sampler import TransformersSampler, end_ids, load_sampler
from megalign.schema import UserError
from tests.support.compare import LOGP_ROUNDING


def make_tokenizer():
    words = ["<pad>", "<eos>", *"0123456789+=", "?"]
    raw = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="?")


def make_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def write_prompts(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def digits(prompt, response, record):
    """A reward by hand: how many digits, plus the record's own bonus."""
    return sum(character.isdigit() for character in response) + record["bonus"]


DIGITS = Reward("digits", digits)


@pytest.fixture
def prompts(tmp_path):
    records = [{"prompt": f"{a}+{a * a}=", "bonus": a} for a in range(7)]
    path = write_prompts(tmp_path / "prompts.jsonl", records)
    return load_prompts(path, make_tokenizer(), reward=DIGITS, vocab_size=15, max_length=8)


def on_ranks(num_ranks, prompts, *, reward=DIGITS):
    """Futures of every rank's result; the ranks are threads, and their gather waits for all of them."""
    shares = [None] * num_ranks
    barrier = Barrier(num_ranks, timeout=60)
    # Not in the threads, which share torch's generator.
    samplers = [TransformersSampler(make_model(), (1,)) for _ in range(num_ranks)]

    def run(rank):
        def gather(share):
            shares[rank] = share
            barrier.wait()
            return list(shares)

        return rollout_round(
            samplers[rank],
            make_tokenizer(),
            prompts,
            SamplingPlan(k=3, temperature=1.0, max_new_tokens=4),
            reward=reward,
            seed=5,
            round_number=2,
            rank=rank,
            num_ranks=num_ranks,
            gather=gather,
        )

    with ThreadPoolExecutor(num_ranks) as pool:
        return [pool.submit(run, rank) for rank in range(num_ranks)]


def test_groups_do_not_depend_on_the_number_of_ranks(prompts):
    alone = on_ranks(1, prompts)[0].result()
    assert [tuple(record["prompt_ids"]) for record in alone.records] == [prompt.ids for prompt in prompts]
    for num_ranks in (2, 3, 8):  # of 8 ranks the last has no prompt
        for future in on_ranks(num_ranks, prompts):
            for one, other in zip(alone.records, future.result().records, strict=True):
                assert one["prompt_ids"] == other["prompt_ids"]
                for left, right in zip(one["responses"], other["responses"], strict=True):
                    assert left["response_ids"] == right["response_ids"]
                    assert left["reward"] == right["reward"]
                    assert left["logp"] == pytest.approx(right["logp"], abs=LOGP_ROUNDING)


class CountingSampler:
    """Answers with the prompt's last tokens and the response's index, in the order of the seeds that it was given."""

    end_ids = (1,)

    def __init__(self):
        self.seen = []

    def sample(self, prompts, seeds, plan):
        self.seen += seeds
        return [
            [Sampled((*prompt[-2:], index + 2, 1), (-1.0,) * 4, finished=True) for index in range(plan.k)]
            for prompt in prompts
        ]

    def update(self, tensors):
        raise AssertionError("a round does not change the weights")


def test_rounds_know_samplers_by_their_protocol_alone(prompts):
    sampler = CountingSampler()
    plan = SamplingPlan(k=2, temperature=0.5, max_new_tokens=4)
    done = rollout_round(sampler, make_tokenizer(), prompts, plan, reward=DIGITS, seed=5, round_number=2)
    assert sampler.seen == [(5, 2, index) for index in range(7)]
    for prompt, record in zip(prompts, done.records, strict=True):
        first, second = record["responses"]
        assert first["response_ids"] == [*prompt.ids[-2:], 2, 1] and second["response_ids"] == [*prompt.ids[-2:], 3, 1]
        # A digit before "=", then the digit 0 or 1, and the record's bonus.
        assert first["reward"] == second["reward"] == 2 + prompt.record["bonus"]
        assert record["temperature"] == 0.5
    assert done.stats["equal_reward_fraction"] == 1 and done.stats["unfinished_fraction"] == 0


def test_rewards_and_statistics(prompts):
    tokenizer = make_tokenizer()
    result = on_ranks(1, prompts)[0].result()
    responses = [response for record in result.records for response in record["responses"]]
    for record, prompt in zip(result.records, prompts):
        for response in record["responses"]:
            # Digits are the tokens 2 to 11.
            assert (
                response["reward"]
                == sum(2 <= token <= 11 for token in response["response_ids"]) + prompt.record["bonus"]
            )
    assert tokenizer.convert_ids_to_tokens([2, 11]) == ["0", "9"]
    rewards = [[response["reward"] for response in record["responses"]] for record in result.records]
    assert result.stats["reward_mean"] == pytest.approx(sum(map(sum, rewards)) / 21)
    assert result.stats["equal_reward_fraction"] == sum(len(set(group)) == 1 for group in rewards) / 7
    assert result.stats["response_length_mean"] == pytest.approx(sum(len(r["response_ids"]) for r in responses) / 21)
    assert result.stats["unfinished_fraction"] == sum(r["response_ids"][-1] != 1 for r in responses) / 21
    assert 0 < result.stats["unfinished_fraction"] < 1


def test_written_groups_are_training_data(prompts, tmp_path):
    result = on_ranks(1, prompts)[0].result()
    write_groups(tmp_path / "new" / "rollout.jsonl", result.records)
    cfg = DataConfig(path=str(tmp_path / "new" / "rollout.jsonl"), max_length=12, tokens_per_micro_batch=64)
    data = load_dataset(cfg, None, pairing=Pairing("samples"), seed=0, vocab_size=15)
    for group, record in zip(data.groups, result.records, strict=True):
        assert group.prompt_ids == tuple(record["prompt_ids"])
        for response, written in zip(group.responses, record["responses"], strict=True):
            assert response.ids == tuple(written["response_ids"])
            assert response.reward == written["reward"]
            assert response.behaviour_logp == tuple(written["logp"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["rollout.jsonl"]


def test_a_bad_reward_on_one_rank_stops_every_rank(prompts):
    def broken(prompt, response, record):
        return float("nan") if record["bonus"] == 1 else 0.0

    for future in on_ranks(2, prompts, reward=Reward("broken", broken)):
        with pytest.raises(UserError, match=r"prompts.jsonl:2: reward 'broken' returned nan"):
            future.result()


def test_rounds_take_an_endless_stream_of_permutations(prompts):
    stream = [
        prompt.record["bonus"]
        for number in range(7)
        for prompt in round_prompts(prompts, seed=3, round_number=number, prompts_per_round=5)
    ]
    assert Counter(stream) == {bonus: 5 for bonus in range(7)}
    epochs = [tuple(stream[first : first + 7]) for first in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 5
    again = round_prompts(prompts, seed=3, round_number=4, prompts_per_round=5)
    assert [prompt.record["bonus"] for prompt in again] == stream[20:25]
    assert stream[:7] != [
        p.record["bonus"] for p in round_prompts(prompts, seed=4, round_number=0, prompts_per_round=7)
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "1+1="}, "prompts.jsonl:2: field prompt is "),
        ({"prompt": "", "answer": "2"}, "prompts.jsonl:2: field prompt is ''"),
        ({"prompt_ids": [2, 15], "answer": "2"}, "prompts.jsonl:2: field prompt"),
        ({"prompt": "123456789", "answer": "2"}, "prompts.jsonl:2: "),
        (
            {"prompt": "1+1="},
            "prompts.jsonl:2: answer is None; must be a string, which reward 'exact_match' needs there",
        ),
    ],
)
def test_bad_prompts_name_line_and_field(tmp_path, record, message):
    path = write_prompts(tmp_path / "prompts.jsonl", [{"prompt": "1+1=", "answer": "2"}, record])
    with pytest.raises(UserError, match=message):
        load_prompts(path, make_tokenizer(), reward=choose_reward("exact_match"), vocab_size=15, max_length=8)


def test_prompts_of_token_ids_get_their_text_for_the_reward(tmp_path):
    path = write_prompts(tmp_path / "prompts.jsonl", [{"prompt_ids": [0, 3, 12, 3, 13], "answer": "2"}])
    prompts = load_prompts(path, make_tokenizer(), reward=choose_reward("exact_match"), vocab_size=15, max_length=8)
    assert prompts[0].text == "1+1="


def test_end_tokens_of_tokenizer_and_model():
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 3]))
    assert end_ids(model, SimpleNamespace(eos_token_id=5)) == (3, 5, 7)
    model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        end_ids(model, SimpleNamespace(eos_token_id=None))


def test_the_command_writes_every_round(prompts, tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "hf")
    rollout = {"path": "-", "rounds": 2, "prompts_per_round": 4, "k": 2, "temperature": 0.8, "max_new_tokens": 4}
    cfg = JobConfig.model_validate(
        {
            "run": {"dir": str(tmp_path / "run"), "seed": 6, "dtype": "fp32"},
            "model": {"path": str(tmp_path / "hf")},
            "data": {"max_length": 12, "tokens_per_micro_batch": 64},
            "loss": {"name": "gvpo"},
            "optimizer": {"lr": 1e-3},
            "rollout": {**rollout, "updates_per_round": 1, "reward": "exact_match"},
        }
    )
    prompts = [replace(prompt, record={"answer": "1"}) for prompt in prompts]
    loaded = load_sampler(tmp_path / "hf", tokenizer, dtype=torch.float32, device=torch.device("cpu"))
    lines = []
    path = write_rollouts(cfg, loaded, tokenizer, prompts, report=lines.append)
    assert path == tmp_path / "run" / "rollout.jsonl"
    assert lines[1].startswith("round 2 of 2: reward_mean ") and lines[2] == f"8 groups in {path}"
    first = path.read_bytes()
    again = cfg.model_copy(update={"run": cfg.run.model_copy(update={"seed": 7})})
    assert write_rollouts(again, loaded, tokenizer, prompts, report=lines.append).read_bytes() != first
    kept = path.with_name("rollout.1.jsonl")
    assert kept.read_bytes() == first and f"earlier groups are kept in {kept}" in lines
    kept.rename(path)
    wanted = [
        record
        for number in (0, 1)
        for record in rollout_round(
            TransformersSampler(model, (1,)),
            tokenizer,
            round_prompts(prompts, seed=6, round_number=number, prompts_per_round=4),
            SamplingPlan(k=2, temperature=0.8, max_new_tokens=4),
            reward=choose_reward("exact_match"),
            seed=6,
            round_number=number,
        ).records
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == wanted
