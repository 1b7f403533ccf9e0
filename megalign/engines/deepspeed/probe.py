"""Finds out from a few short sequences how a transformers model may be run, with its own weights.

Some models mix up sequences that share a row, and some do more than a matrix product behind their last hidden state.
Neither is declared anywhere, so the model's own logits, one sequence at a time, say what is right.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import pack
from megalign.engines.deepspeed.attention import NotPackable, PackedRows
from megalign.engines.deepspeed.policy import HFPolicy
from megalign.engines.head import Head
from megalign.schema import UserError

# Fields that some configurations have: factors and divisors of the logits, and their soft caps.
TIMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
LENGTHS = (7, 12, 5)
# Relative to the log-probs' mean deviation. Measured over 17 small families, the right way is within 6e-7 in fp32 and
# 6e-3 in bf16, and a wrong one (Falcon's sequences in one row) 0.35 off; deeper models round more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def settle(policy: HFPolicy, *, own: PackedRows | None) -> str:
    """Choose how the policy computes log-probs as its model does, the fastest way first; return it in words.

    own: megalign's attention over packed rows, where it computes attention of the model's kind. Raises UserError where
    log-probs do not follow from the last hidden state. Call on every rank, after the weights are loaded.
    """
    policy.eval()
    temperature = policy.head_cfg.temperature
    policy.head_cfg = dataclasses.replace(policy.head_cfg, temperature=1.0)
    try:
        with torch.no_grad():
            return _settle(policy, own)
    finally:
        policy.head_cfg = dataclasses.replace(policy.head_cfg, temperature=temperature)


def _settle(policy: HFPolicy, own: PackedRows | None) -> str:
    model, sequences = policy.model, _sequences(policy.vocab_size)
    true = torch.cat([policy(partial(_own_logp, model, sequence)) for sequence in sequences])
    allowed = TOLERANCE[model.dtype] * float((true - true.mean()).abs().mean()) + 1e-6
    theirs = model.config._attn_implementation
    _settle_head(policy, sequences, true, allowed)
    attempts: list[tuple[PackedRows | None, str, str]] = []
    if own is not None and policy.takes_positions:
        attempts.append((own, own.name, "sequences run as packed rows"))
    if policy.takes_positions and (own is None or own.context is None):
        attempts.append((None, theirs, f"sequences run as packed rows, transformers' {theirs} attention"))
    policy.packs = True
    for attention, implementation, words in attempts:
        policy.attention = attention
        model.set_attn_implementation(implementation)
        if _packs(policy, sequences, true, allowed):
            return words
    policy.packs, policy.attention = False, None
    model.set_attn_implementation(theirs)
    if own is not None and own.context is not None:
        raise UserError(
            f"parallel.context is {own.context.size()}: {type(model).__name__} does not compute attention through "
            "transformers' attention interface alone; must be 1 for this model"
        )
    return "sequences run as padded rows, because the model does not tell packed sequences apart"


def _packs(policy: HFPolicy, sequences: Sequence[TokenSequence], true: Tensor, allowed: float) -> bool:
    try:
        return _error(policy, sequences, true) <= allowed
    except NotPackable:
        return False


def _sequences(vocab_size: int) -> list[TokenSequence]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (length,), generator=draw).tolist() for length in LENGTHS]
    return [
        TokenSequence(index, index, "response", tuple(each[:1]), Response(tuple(each[1:])))
        for index, each in enumerate(ids)
    ]


def _own_logp(model: Any, sequence: TokenSequence) -> Tensor:
    """Return the log-probs [tokens] that the model's own forward gives a sequence's response."""
    ids = torch.tensor([*sequence.prompt_ids, *sequence.response.ids], device=model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(dim=-1).gather(1, ids[1:, None]).squeeze(1)


def _error(policy: HFPolicy, sequences: Sequence[TokenSequence], true: Tensor) -> float:
    """Return the mean difference of the policy's log-probs in one micro-batch from the true ones."""
    results: list[Tensor] = []

    def score(head: Head) -> Tensor:
        results.append(head.logp().logp_N)
        return results[-1].sum()

    multiple = 1 if policy.context is None else policy.context.size()
    batch = pack(sequences, range(len(sequences)), pad_rows=not policy.packs, multiple_of=multiple)
    policy(partial(policy.loss, batch, score))
    return float((results[0] - true).abs().mean())


def _settle_head(policy: HFPolicy, sequences: Sequence[TokenSequence], true: Tensor, allowed: float) -> None:
    """Set the scale and soft cap of the logits under which padded rows give the true log-probs."""
    wanted, config = policy.head_cfg, policy.model.config.get_text_config()
    scales = [1 / value for value in _numbers(config, DIVIDED_BY)] + [*_numbers(config, TIMES), 1.0]
    softcaps = [*_numbers(config, CAPS), None]
    policy.packs, policy.attention = False, None
    errors = []
    # Some models number positions otherwise than from 0 when they are not given.
    for takes_positions in [True, False] if policy.takes_positions else [False]:
        policy.takes_positions = takes_positions
        for scale, softcap in itertools.product(scales, softcaps):
            policy.head_cfg = dataclasses.replace(wanted, scale=scale, softcap=softcap)
            errors.append(_error(policy, sequences, true))
            if errors[-1] <= allowed:
                return
    raise UserError(
        f"{policy.model.config.name_or_path}: log-probs of the last hidden state and the head differ from those of "
        f"{type(policy.model).__name__} by {min(errors):.3g} nats; must be a model whose logits are its head's "
        f"product, scaled or capped by one of {', '.join(sorted({*TIMES, *DIVIDED_BY, *CAPS}))}"
    )


def _numbers(config: Any, names: Sequence[str]) -> list[float]:
    return [float(value) for name in names if (value := getattr(config, name, None))]
