"""Samples with a `transformers` model from the exact softmax, with draws that do not depend on batching.

Axes: B rows of a batch (one row is one response), V vocabulary.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from megalign.rollout.ends import NO_END
from megalign.rollout.sampler import Sampled, SamplingPlan
from megalign.schema import UserError

Beat = Callable[[], None]  # tells a watchdog of progress
SUM_COLUMNS = 512  # of a block whose sums one matrix product gives
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


class TransformersSampler:
    """Implements `Sampler` with the whole model on this rank's device; `beat` is called for each step of a batch."""

    def __init__(self, model: Any, end_ids: tuple[int, ...], beat: Beat = lambda: None) -> None:
        self.model, self.beat = model, beat
        self._end_ids = end_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the token ids that end a response."""
        return self._end_ids

    def sample(
        self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[tuple[int, ...]], plan: SamplingPlan
    ) -> list[list[Sampled]]:
        """Sample `plan.k` responses to each prompt, in prompt order.

        The uniform number that draws a token depends only on the prompt's seed, the response's index and the token's
        index.
        """
        rows = [(index, number) for index in range(len(prompts)) for number in range(plan.k)]
        rows.sort(key=lambda row: (len(prompts[row[0]]), row))
        result: list[list[Any]] = [[None] * plan.k for _ in prompts]
        training = self.model.training
        self.model.eval()
        with _plain_generation(self.model):
            for batch in _batches(rows, prompts, plan):
                picker = _Picker(
                    np.stack([uniforms((*seeds[index], number), plan.max_new_tokens) for index, number in batch]),
                    temperature=plan.temperature,
                    device=self.model.device,
                    beat=self.beat,
                )
                token_BT = _generate(
                    self.model,
                    [prompts[index] for index, _ in batch],
                    picker,
                    max_new_tokens=plan.max_new_tokens,
                    end_ids=self.end_ids,
                )
                for (index, number), ids, logp in zip(batch, token_BT.tolist(), picker.logp_BT().tolist()):
                    result[index][number] = _truncate(ids, logp, self.end_ids)
        self.model.train(training)
        return result

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the tensors into the model."""
        own = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in tensors:
                _tensor_named(own, name).copy_(tensor)


def load_sampler(
    hf_dir: Path, tokenizer: Any, *, dtype: torch.dtype, device: torch.device, beat: Beat = lambda: None
) -> TransformersSampler:
    """Load a Hugging Face directory with its weights."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # in a log every update of a bar is a line
    model = AutoModelForCausalLM.from_pretrained(
        str(hf_dir), config=_config(hf_dir), dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    return TransformersSampler(model.to(device), end_ids(model, tokenizer), beat)


def empty_sampler(
    hf_dir: Path, tokenizer: Any, *, dtype: torch.dtype, device: torch.device, beat: Beat = lambda: None
) -> TransformersSampler:
    """Build a Hugging Face directory's model without its weights; `update` must fill them in."""
    model = AutoModelForCausalLM.from_config(_config(hf_dir), dtype=dtype, trust_remote_code=False)
    if (hf_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(hf_dir), local_files_only=True)
    return TransformersSampler(model.to(device).eval().requires_grad_(False), end_ids(model, tokenizer), beat)


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's EOS and those of the generation settings (end of turn)."""
    more = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not ends:
        raise UserError(NO_END)
    return tuple(sorted(ends))


def _config(hf_dir: Path) -> Any:
    """Read the checkpoint's `transformers` configuration, without its padding token, which may have no embedding."""
    config = AutoConfig.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    config.pad_token_id = None
    return config


def _tensor_named(own: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the model's tensor for a checkpoint's name; transformers stacks experts, checkpoints may not."""
    name = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's checkpoints
    match = EXPERT.fullmatch(name)
    if match is None:
        return own[name]
    experts, number, projection = match[1], int(match[2]), match[3]
    if projection in ("down_proj", "w2"):
        return own[f"{experts}.down_proj"][number]
    gate, up = own[f"{experts}.gate_up_proj"][number].chunk(2)
    return gate if projection in ("gate_proj", "w1") else up


def uniforms(seed: tuple[int, ...], count: int) -> np.ndarray:
    """Draw `count` float64 numbers in [0, 1); a larger `count` only appends more numbers."""
    return np.random.default_rng([part % 2**64 for part in seed]).random(count)


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw each row's token by inverting the cumulative distribution in float64; return (tokens, log-probs).

    One uniform number a token keeps the draw independent of the other rows and of the vocabulary's size.
    """
    logp_BV = torch.log_softmax(logits_BV.double() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logp_BV.argmax(dim=-1)
    else:
        cumulative_BV = _cumulative(logp_BV.exp())
        # Scaled by the last entry, which rounding may keep from being 1: the search never runs past the end, and
        # with `right` never picks a token of probability zero.
        point_B = uniform_B * cumulative_BV[:, -1]
        token_B = torch.searchsorted(cumulative_BV, point_B[:, None], right=True).squeeze(1)
        token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


def _cumulative(share_BV: Tensor) -> Tensor:
    """Return the sums up to each column, which CUDA refuses to compute by its own kernel in deterministic mode."""
    if not (share_BV.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return share_BV.cumsum(dim=-1)
    rows, columns = share_BV.shape
    blocks = F.pad(share_BV, (0, -columns % SUM_COLUMNS)).view(rows, -1, SUM_COLUMNS)
    upper = torch.ones(SUM_COLUMNS, SUM_COLUMNS, dtype=share_BV.dtype, device=share_BV.device).triu()
    inside = blocks @ upper
    count = blocks.shape[1]
    before = inside[..., -1] @ torch.ones(count, count, dtype=share_BV.dtype, device=share_BV.device).triu(1)
    return (inside + before[..., None]).flatten(1)[:, :columns]


class _Picker(LogitsProcessor):
    """Turns greedy generation into sampling: sets every logit but the drawn token's to -inf, and keeps its log-prob."""

    def __init__(
        self, uniform_BT: np.ndarray, *, temperature: float, device: torch.device, beat: Beat = lambda: None
    ) -> None:
        self.beat = beat
        self.uniform_BT = torch.from_numpy(uniform_BT).to(device)
        self.temperature = temperature
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.beat()
        token_B, logp_B = pick(scores, self.uniform_BT[:, len(self.logps)], self.temperature)
        self.logps.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)

    def logp_BT(self) -> Tensor:
        """Return the drawn tokens' log-probs."""
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
    rows: list[tuple[int, int]], prompts: Sequence[tuple[int, ...]], plan: SamplingPlan
) -> Iterator[list[tuple[int, int]]]:
    """Divide `rows`, sorted by prompt length, so that rows x (longest prompt + max_new_tokens) fits the budget."""
    batch: list[tuple[int, int]] = []
    for row in rows:
        width = len(prompts[row[0]]) + plan.max_new_tokens
        if batch and (len(batch) + 1) * width > plan.token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    picker: _Picker,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
) -> Tensor:
    """Generate and return the new tokens, [B, steps], padded after a row's end-of-sequence token."""
    longest = max(len(prompt) for prompt in prompts)
    pad_id = end_ids[0]  # masked out; the tokenizer's padding token may be outside the model's vocabulary
    token_BT = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    out_BT = model.generate(
        input_ids=token_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([picker]),
    )
    return out_BT[:, longest:]


def _truncate(ids: list[int], logp: list[float], end_ids: Sequence[int]) -> Sampled:
    """Truncate a row after its first end-of-sequence token."""
    length = next((index + 1 for index, token in enumerate(ids) if token in end_ids), None)
    return Sampled(ids=tuple(ids[:length]), logp=tuple(logp[:length]), finished=length is not None)
