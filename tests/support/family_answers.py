"""The sequences on which families are compared with transformers, and what transformers computes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalign.data.group import Response, TokenSequence
from tests.support.oracle import as_stored

LENGTHS = (37, 7, 16, 23, 2)


def sequences() -> list[TokenSequence]:
    """Return ragged sequences of random tokens, all but the first of each scored."""
    random = torch.Generator().manual_seed(5)
    tokens = [torch.randint(131, (length,), generator=random).tolist() for length in LENGTHS]
    return [TokenSequence(0, 0, "response", tuple(ids[:1]), Response(tuple(ids[1:]))) for ids in tokens]


def answer(folder: Path, dtype: torch.dtype, *, gradients: bool) -> dict[str, Any]:
    """Return what transformers computes of a stored model in `dtype`, sequence by sequence.

    logits: of each sequence, fp32. logp: of all scored tokens. gradients: of their sum, by stored name, if asked for.
    """
    import transformers

    # The flash and grouped kernels that transformers would choose do without some families' details.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    logits, logp, total = [], [], torch.zeros(())
    with torch.set_grad_enabled(gradients):
        for sequence in sequences():
            ids = torch.tensor([[*sequence.prompt_ids, *sequence.response.ids]])
            logits.append(model(ids, use_cache=False).logits[0].float())
            logp.append(logits[-1][:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1))
            total = total + logp[-1].sum()
    found: dict[str, Any] = {"logits": [each.detach() for each in logits], "logp": torch.cat(logp).detach()}
    if gradients:
        total.backward()
        by_name = {name: parameter.grad for name, parameter in model.named_parameters()}
        stacked = {} if model.config.model_type == "gpt_oss" else as_stored(model, by_name)
        found["gradients"] = stacked or by_name
    return found
