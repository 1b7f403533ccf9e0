"""Defines what rounds need from a sampler, which may be a model in this process or a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

TOKEN_BUDGET = 65536


@dataclass(frozen=True, slots=True)
class Sampled:
    """Holds one response: its token ids, including the end-of-sequence token if it was sampled, and their log-probs.

    `logp` is taken from the sampling distribution: the logits divided by the temperature (by 1 for greedy).
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool  # it ends with an end-of-sequence token, not at max_new_tokens


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Says how to sample each prompt: `k` responses, at a temperature (0 is greedy), up to `max_new_tokens` tokens.

    token_budget: positions of one batch, including prompt padding and `max_new_tokens` a row.
    """

    k: int
    temperature: float
    max_new_tokens: int
    token_budget: int = TOKEN_BUDGET


class Sampler(Protocol):
    """Samples responses under the weights of the last `update`."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the token ids that end a response, in order; at least one."""

    def sample(
        self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[tuple[int, ...]], plan: SamplingPlan
    ) -> list[list[Sampled]]:
        """Sample `plan.k` responses to each prompt, in prompt order.

        A response depends on its prompt, the prompt's seed and the response's index alone, not on other
        prompts sampled at the same time.
        """

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights; tensors: (Hugging Face name, whole tensor) pairs, consumed one at a time to the end."""
