"""Supplies the groups of a round, sampled by the live policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from megalign.config.job import JobConfig
from megalign.config.sections import RolloutConfig
from megalign.engines.protocol import Engine
from megalign.rollout.collect import Round, rollout_round
from megalign.rollout.prompts import Prompt, round_prompts
from megalign.rollout.rewards import Reward, call_limit_s
from megalign.rollout.sampler import Sampler, SamplingPlan
from megalign.runtime.ranks import gather, on_every_rank


class GroupSource(Protocol):
    """Supplies each round's groups; every method is called on all ranks and returns the same on each."""

    def round(self, number: int, attempt: int) -> Round:
        """Return the groups of round `number` (from 0); a later attempt samples others for the same prompts."""

    def origins(self, number: int) -> list[str]:
        """Return where each prompt of round `number` (from 0) was read, as `path:line`."""

    def mean_reward(self, prompts: Sequence[Prompt]) -> float:
        """Return the mean reward of greedy responses to the prompts under the live weights."""


@dataclass(frozen=True, slots=True)
class LiveSampling:
    """Samples with the engine's weights at a round's start; each rank samples part of the prompts."""

    cfg: JobConfig
    engine: Engine
    sampler: Sampler
    tokenizer: Any
    prompts: Sequence[Prompt]
    reward: Reward
    beat: Callable[[], None] = lambda: None  # tells the watchdog of progress

    @property
    def rollout(self) -> RolloutConfig:
        """Return the section `rollout` of the configuration."""
        assert self.cfg.rollout is not None
        return self.cfg.rollout

    def round(self, number: int, attempt: int) -> Round:
        """Sample and reward responses to the round's prompts."""
        if attempt == 0:  # later attempts use the same weights
            self.sampler.update(self.engine.hf_tensors())
        rollout, prompts = self.rollout, self._prompts_of(number)
        plan = SamplingPlan(rollout.k, rollout.temperature, rollout.max_new_tokens)
        # Numbers after the job's last round, so that no later round repeats the draws of an attempt.
        return self._collect(prompts, plan, draws=number + attempt * rollout.rounds)

    def origins(self, number: int) -> list[str]:
        """Return where each prompt of round `number` was read."""
        return [prompt.where for prompt in self._prompts_of(number)]

    def _prompts_of(self, number: int) -> list[Prompt]:
        size = self.rollout.prompts_per_round
        return round_prompts(self.prompts, seed=self.cfg.run.seed, round_number=number, prompts_per_round=size)

    def mean_reward(self, prompts: Sequence[Prompt]) -> float:
        """Return the mean reward of greedy responses to the prompts under the live weights."""
        self.sampler.update(self.engine.hf_tensors())
        plan = SamplingPlan(1, 0.0, self.rollout.max_new_tokens)
        return self._collect(prompts, plan, draws=0).stats["reward_mean"]

    def _collect(self, prompts: Sequence[Prompt], plan: SamplingPlan, *, draws: int) -> Round:
        # An error of one rank's reward is raised on every rank and printed by one.
        return on_every_rank(
            lambda: rollout_round(
                self.sampler,
                self.tokenizer,
                prompts,
                plan,
                reward=self.reward,
                seed=self.cfg.run.seed,
                round_number=draws,
                rank=dist.get_rank(),
                num_ranks=dist.get_world_size(),
                gather=gather,
                reward_limit_s=call_limit_s(self.cfg.watchdog.timeout_s),
                beat=self.beat,
            )
        )
