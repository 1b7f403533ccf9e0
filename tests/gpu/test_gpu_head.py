"""The head on a CUDA device against dense float64 logits on the same device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalign.ops.block_passes import choose_passes
from megalign.ops.head_blocks import HeadConfig
from megalign.ops.linear_logp import linear_logp, weighted_logp
from megalign.ops.vocab import VocabShard
from megalign.ops.weight_grad import main_grad_sink

pytestmark = pytest.mark.gpu
TOKENS, HIDDEN, VOCAB, ROWS = 300, 256, 5003, 5120


def dense(hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(log-probs, log-sum-exps) in float64."""
    logits_TV = hidden_TH.double() @ weight_VH[:VOCAB].double().t()
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logp_T = logits_TV.log_softmax(dim=1).gather(1, target_T[:, None]).squeeze(1)
    return logp_T, logits_TV.logsumexp(dim=1)


@pytest.mark.parametrize("form", ["recompute", "own lse", "given lse"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("kernel", ["torch", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_values_and_gradients(
    form: str, softcap: float | None, kernel: str, dtype: torch.dtype, tolerance: float
) -> None:
    """fp32 with TF32 off; in bf16 the logits' gradient is rounded once, their own sums stay fp32."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight_VH = (torch.randn(ROWS, HIDDEN, device="cuda", generator=generator) / 4).to(dtype).requires_grad_()
    target_T = torch.randint(VOCAB, (TOKENS,), device="cuda", generator=generator)
    coefficient_T = torch.randn(TOKENS, device="cuda", generator=generator)
    weight_VH.main_grad = torch.zeros(ROWS, HIDDEN, device="cuda")  # type: ignore[attr-defined]
    right_T, right_lse_T = dense(hidden_TH, weight_VH, target_T, softcap)
    right = torch.autograd.grad((right_T * coefficient_T).sum(), (hidden_TH, weight_VH))
    shard = VocabShard(0, ROWS, VOCAB)
    passes = choose_passes(kernel, weight_VH.device)
    cfg, sink = HeadConfig(softcap=softcap, chunk_tokens=128, compiled=passes), main_grad_sink(weight_VH)
    if form == "recompute":
        found = linear_logp(hidden_TH, weight_VH, target_T, shard, cfg=cfg, entropy=True, accuracy=True, sink=sink)
        value = (found.logp_N * coefficient_T).sum()
    else:
        lse_T = right_lse_T.float() if form == "given lse" else None
        value, found = weighted_logp(
            hidden_TH, weight_VH, target_T, coefficient_T, shard, lse_N=lse_T, cfg=cfg, sink=sink
        )
    value.backward()
    assert passes is None or not passes.failed
    torch.testing.assert_close(found.logp_N.double(), right_T, rtol=1e-4, atol=1e-4)
    assert hidden_TH.grad is not None
    for mine, theirs in ((hidden_TH.grad, right[0]), (weight_VH.main_grad, right[1])):  # type: ignore[attr-defined]
        assert (mine.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


def test_memory_is_a_few_blocks() -> None:
    """Extra memory of forward and backward does not grow with the number of tokens."""
    used = []
    for tokens in (2048, 8192):
        hidden_TH = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight_VH = torch.randn(32768, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight_VH.main_grad = torch.zeros(32768, HIDDEN, device="cuda")  # type: ignore[attr-defined]
        target_T = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cfg, shard = HeadConfig(chunk_tokens=1024), VocabShard(0, 32768, 32768)
        found = linear_logp(hidden_TH, weight_VH, target_T, shard, cfg=cfg, sink=main_grad_sink(weight_VH))
        found.logp_N.sum().backward()
        used.append(torch.cuda.max_memory_allocated() - before - 3 * hidden_TH.numel() * 4 - 64 * tokens * 4)
    assert used[1] <= used[0] + (8 << 20)
