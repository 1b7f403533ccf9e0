"""Feeds training steps from rounds: the live policy samples, responses are rewarded and scored, updates follow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megalign.config import JobConfig
from megalign.convert import ModelConfig, hf_state
from megalign.data.dataset import GroupDataset, from_records
from megalign.engines.engine import Engine, Scorer
from megalign.engines.megatron import BaseModel, MegatronEngine
from megalign.engines.step import StepBatch
from megalign.rollout.command import sampler_config
from megalign.rollout.prompts import Prompt, round_prompts
from megalign.rollout.rewards import call_limit_s, choose_reward
from megalign.rollout.rounds import Round, rollout_round, without_texts
from megalign.train.check import Inputs
from megalign.train.round_scores import RoundScores, Update, score_round
from megalign.train.session import SharedError, dtype_of, gather, on_every_rank

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
ATTEMPTS = 8  # samplings of one round before it counts as hopeless


def live_sampler(cfg: JobConfig, inputs: Inputs, device: torch.device) -> Any:
    """Build a `transformers` model of the policy's configuration on every rank; `refresh` fills in its weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = sampler_config(inputs.hf_dir)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(cfg), trust_remote_code=False)
    if (inputs.hf_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(inputs.hf_dir), local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def refresh(sampler: Any, engine: Engine, inputs: Inputs) -> None:
    """Copy the live weights into the sampler, gathered tensor by tensor; called on every rank."""
    own = sampler.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in hf_state(inputs.model, engine.full_tensors()):
            _home(own, name).copy_(tensor)


def _home(own: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Find the sampler's tensor for a checkpoint's name; transformers stacks experts, checkpoints do not."""
    name = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's checkpoints
    match = EXPERT.fullmatch(name)
    if match is None:
        return own[name]
    experts, number, projection = match[1], int(match[2]), match[3]
    if projection in ("down_proj", "w2"):
        return own[f"{experts}.down_proj"][number]
    gate, up = own[f"{experts}.gate_up_proj"][number].chunk(2)
    return gate if projection in ("gate_proj", "w1") else up


@dataclass
class RoundTimes:
    """Measures a round: the seconds of sampling, of scoring and since its start, and the tokens trained on."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0  # trained on so far, as the metric of a step counts them
    sampling: float = 0.0
    scoring: float = 0.0

    def seconds(self) -> float:
        """Return the seconds since the round began, including saves and evaluations between its steps."""
        return time.perf_counter() - self.began

    def sampled(self) -> None:
        """Record the sampling time; called when sampling and rewarding, which come first, are done."""
        self.sampling = self.seconds()

    def scored(self) -> None:
        """Record the scoring time; called when scoring, which comes next, is done."""
        self.scoring = self.seconds() - self.sampling

    def metrics(self, *, first: bool) -> dict[str, float]:
        """Return the times to report with a step; sampling and scoring count for the round's first step only."""
        seconds = self.seconds()
        return {
            "round_seconds": seconds,
            "sampling_seconds": self.sampling if first else 0.0,
            "scoring_seconds": self.scoring if first else 0.0,
            "round_tokens_per_second": self.tokens / seconds,
        }


@dataclass
class RoundFeed:
    """Supplies steps with the rounds' samples; `fixed` scores a reference other than the round's policy."""

    cfg: JobConfig
    inputs: Inputs
    engine: Engine
    sampler: Any
    fixed: Scorer | None
    records: list[dict[str, Any]] = field(default_factory=list)  # without texts
    round_number: int = -1
    _dataset: GroupDataset | None = None
    _scores: RoundScores = field(default_factory=RoundScores)
    _stats: dict[str, float] = field(default_factory=dict)
    _times: RoundTimes = field(default_factory=RoundTimes)

    def batch(self, step: int) -> StepBatch:
        assert self.cfg.rollout is not None
        number, update = divmod(step, self.cfg.rollout.updates_per_round)
        if number != self.round_number:
            self._times = RoundTimes()
            self._sample(number)
            self._times.sampled()
            updates = [self._sequences(one) for one in range(self.cfg.rollout.updates_per_round)]
            self._scores = score_round(self.cfg, self.engine, self.fixed, updates)
            self._times.scored()
        sequences, num_groups = self._sequences(update)
        self._times.tokens += sum(len(sequence) for sequence in sequences)
        return self._scores.batch(self.cfg, update, sequences, num_groups)

    def _sequences(self, update: int) -> Update:
        """Return the update's `groups_per_step` groups: the round's next ones, starting over after its last."""
        count = self.cfg.data.groups_per_step
        assert count is not None and self._dataset is not None
        places = range(update * count, (update + 1) * count)
        return self._dataset.sequences([divmod(place, len(self._dataset)) for place in places])

    def _sample(self, number: int) -> None:
        """Sample the round's groups; if the loss can use none of them, sample again with other random draws."""
        rollout = self.cfg.rollout
        assert rollout is not None
        refresh(self.sampler, self.engine, self.inputs)
        prompts = round_prompts(
            self.inputs.prompts,
            seed=self.cfg.run.seed,
            round_number=number,
            prompts_per_round=rollout.prompts_per_round,
        )
        for attempt in range(ATTEMPTS):
            draws = number + attempt * rollout.rounds
            done = _rollout(self, prompts, k=rollout.k, temperature=rollout.temperature, round_number=draws)
            self.records, self.round_number = [without_texts(record) for record in done.records], number
            self._stats = {f"rollout_{name.removeprefix('rollout_')}": value for name, value in done.stats.items()}
            try:
                self._read()
                return
            except SharedError as error:
                problem = str(error)
        name = self.cfg.loss.name
        raise SharedError(
            f"rollout.reward is {rollout.reward!r}: loss {name} has no use for any group of round {number + 1}, "
            f"sampled {ATTEMPTS} times; must tell some responses to a prompt apart; the last problem: {problem}"
        )

    def _read(self) -> None:
        """Make training data of the round's groups; those the loss cannot use (DPO: equal rewards) are counted."""
        data = self.cfg.data.model_copy(update={"on_bad_record": "skip"})
        self._dataset = on_every_rank(
            lambda: from_records(
                self.records,
                data,
                self.inputs.tokenizer,
                pairing=self.cfg.loss.traits().pairing,
                seed=self.cfg.run.seed + self.round_number,
                vocab_size=self.inputs.model.vocab_size,
                origin=f"round {self.round_number + 1} group",
            )
        )
        self._stats["rollout_skipped_groups"] = float(self._dataset.report.num_records - self._dataset.report.num_kept)

    def stats(self, step: int) -> Mapping[str, float]:
        """Return the round's metrics and its times; `step` is the one just taken."""
        assert self.cfg.rollout is not None
        update = step % self.cfg.rollout.updates_per_round
        # The first update's step reports its own mismatch.
        mismatch = self._scores.mismatch[update] if update and self._scores.mismatch else {}
        return {**self._stats, **mismatch, **self._times.metrics(first=update == 0)}

    def state(self) -> dict[str, Any]:
        """Return the round in progress for a checkpoint: a resume trains on the same samples and scores."""
        # Rank 0's clocks: what a checkpoint holds of the job must be the same on every rank.
        stats, seconds = gather((self._stats, self._times.seconds()))[0]
        return {
            "round_number": self.round_number,
            "records": self.records,
            "stats": stats,
            "scores": self._scores.plain(),
            "times": (seconds, self._times.tokens),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["round_number"] < 0:
            return
        self.round_number, self.records = state["round_number"], state["records"]
        self._read()
        self._stats = state["stats"]
        by_token = self.cfg.loss.traits().level == "token"
        self._scores = RoundScores.from_plain(state["scores"], by_token=by_token)
        seconds, tokens = state["times"]
        self._times = RoundTimes(began=time.perf_counter() - seconds, tokens=tokens)


def evaluate_reward(feed: RoundFeed, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Sample greedy responses to held-out prompts with the live weights and return their mean reward."""
    refresh(feed.sampler, feed.engine, feed.inputs)
    done = _rollout(feed, prompts, k=1, temperature=0.0, round_number=0)
    return {"eval_reward": done.stats["reward_mean"]}


def _rollout(feed: RoundFeed, prompts: Sequence[Prompt], *, k: int, temperature: float, round_number: int) -> Round:
    rollout = feed.cfg.rollout
    assert rollout is not None
    reward = choose_reward(rollout.reward)
    # An error of one rank's reward is raised on every rank and printed by one.
    return on_every_rank(
        lambda: rollout_round(
            feed.sampler,
            feed.inputs.tokenizer,
            prompts,
            reward=reward,
            k=k,
            temperature=temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=feed.cfg.run.seed,
            round_number=round_number,
            rank=dist.get_rank(),
            num_ranks=dist.get_world_size(),
            gather=gather,
            reward_limit_s=call_limit_s(feed.cfg.watchdog.timeout_s),
        )
    )


def fixed_reference(
    cfg: JobConfig,
    inputs: Inputs,
    policy: MegatronEngine,
    build: Callable[[ModelConfig], MegatronEngine],
    load_initial: Callable[[MegatronEngine], None],
) -> Scorer | None:
    """Build the scorer of a reference other than the round's policy: its own engine, or the policy without adapters."""
    if not cfg.loss.traits().reference or cfg.reference.source == "round_start":
        return None
    if inputs.reference is None and cfg.lora is not None:
        return BaseModel(policy)
    if inputs.reference is None:
        engine = build(inputs.model)
        load_initial(engine)
    else:
        folder, model = inputs.reference
        engine = build(model)
        engine.load_weights(folder)
    return engine
