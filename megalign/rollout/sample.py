"""Samples at a temperature, exactly, and with the same draws however prompts are spread over batches and ranks.

Axes: B rows of a batch (one row is one response in the making), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


@dataclass(frozen=True, slots=True)
class Sampled:
    """One response: its token ids, including the end-of-sequence token if it was sampled, and their log-probs.

    `logp` is taken from the sampling distribution: the logits divided by the temperature (by 1 for greedy).
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool  # it ends with an end-of-sequence token; else it was cut at max_new_tokens


def sample(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    seeds: Sequence[tuple[int, ...]],
    k: int,
    temperature: float,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    token_budget: int = 65536,
) -> list[list[Sampled]]:
    """Sample `k` responses to each prompt from a plain `transformers` model, in prompt order; temperature 0 is greedy.

    The uniform number that draws a token depends on (the prompt's seed, the sample's index, the token's index) alone.
    token_budget: positions of one batch, including prompt padding and `max_new_tokens` a row.
    """
    rows = [(place, index) for place in range(len(prompts)) for index in range(k)]
    rows.sort(key=lambda row: (len(prompts[row[0]]), row))
    result: list[list[Any]] = [[None] * k for _ in prompts]
    training = model.training
    model.eval()
    with _plain_generation(model):
        for batch in _batches(rows, prompts, max_new_tokens=max_new_tokens, token_budget=token_budget):
            picker = _Picker(
                np.stack([uniforms((*seeds[place], index), max_new_tokens) for place, index in batch]),
                temperature=temperature,
                device=model.device,
            )
            token_BT = _generate(
                model, [prompts[place] for place, _ in batch], picker, max_new_tokens, eos_ids=eos_ids, pad_id=pad_id
            )
            for (place, index), ids, logp in zip(batch, token_BT.tolist(), picker.logp_BT().tolist()):
                result[place][index] = _cut(ids, logp, eos_ids)
    model.train(training)
    return result


def uniforms(seed: tuple[int, ...], count: int) -> np.ndarray:
    """Draw `count` float64 numbers in [0, 1); the first ones are the same whatever `count` is."""
    return np.random.default_rng([part % 2**64 for part in seed]).random(count)


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw each row's token by inverting the cumulative distribution in float64; return (tokens, log-probs).

    One uniform number a token keeps the draw independent of the other rows and of the vocabulary's size.
    """
    logp_BV = torch.log_softmax(logits_BV.double() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logp_BV.argmax(dim=-1)
    else:
        cumulative_BV = logp_BV.exp().cumsum(dim=-1)
        # Scaled by the last entry, which rounding leaves near 1 but not at it: never past the end, and with
        # `right` never on a token of probability zero.
        point_B = uniform_B * cumulative_BV[:, -1]
        token_B = torch.searchsorted(cumulative_BV, point_B[:, None], right=True).squeeze(1)
        token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


class _Picker(LogitsProcessor):
    """Turns greedy generation into sampling: sets every logit but the drawn token's to -inf, and keeps its log-prob."""

    def __init__(self, uniform_BT: np.ndarray, *, temperature: float, device: torch.device) -> None:
        self.uniform_BT = torch.from_numpy(uniform_BT).to(device)
        self.temperature = temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B, logp_B = pick(scores, self.uniform_BT[:, len(self.logps)], self.temperature)
        self.logps.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    def logp_BT(self) -> Tensor:
        return torch.stack(self.logps, dim=1)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Hide the checkpoint's generation defaults (top_k, repetition_penalty, ...), which `generate` merges in."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _batches(
    rows: list[tuple[int, int]], prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, token_budget: int
) -> Iterator[list[tuple[int, int]]]:
    """Cut `rows`, sorted by prompt length, so that rows x (longest prompt + max_new_tokens) fits the budget."""
    batch: list[tuple[int, int]] = []
    for row in rows:
        width = len(prompts[row[0]]) + max_new_tokens
        if batch and (len(batch) + 1) * width > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    picker: _Picker,
    max_new_tokens: int,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Generate and return the new tokens, [B, steps], padded after a row's end-of-sequence token."""
    longest = max(len(prompt) for prompt in prompts)
    token_BT = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    plan = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    out_BT = model.generate(
        input_ids=token_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=plan,
        logits_processor=LogitsProcessorList([picker]),
    )
    return out_BT[:, longest:]


def _cut(ids: list[int], logp: list[float], eos_ids: Sequence[int]) -> Sampled:
    """Cut a row after its first end-of-sequence token."""
    end = next((place + 1 for place, token in enumerate(ids) if token in eos_ids), None)
    length = len(ids) if end is None else end
    return Sampled(ids=tuple(ids[:length]), logp=tuple(logp[:length]), finished=end is not None)
