"""Checks of single operations on the pretended device: `python -m tests.gpu_pretended.kernel_checks NAME ...`.

Prints {name: traceback, or nothing where the check passed} as JSON in the last line.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.gpu_pretended import device

HALF = torch.bfloat16


def attend_slowly(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], **wanted: Any) -> Tensor:
    """Attention slot by slot by whole scores in float64."""
    window, sinks, scale = wanted.get("window"), wanted.get("sinks"), query.shape[-1] ** -0.5
    repeats, out = query.shape[1] // key.shape[1], []
    for q, k, v in zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        score = torch.einsum("qnd,knd->nqk", q, k) * scale
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        score = score.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            score = torch.cat((score, sinks[:, None, None].expand(-1, len(q), 1)), -1)
        share = score.softmax(-1)
        out.append(torch.einsum("nqk,knd->qnd", share if sinks is None else share[..., :-1], v))
    return torch.cat(out)


def compare_attention(
    sizes: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: Any, **wanted: Any
) -> None:
    """Values and gradients of packed attention on the device against float64 on the CPU."""
    from megalign.models.packed_attention import PackedAttention, Scores
    from megalign.models.slots import Slots

    random = torch.Generator().manual_seed(dims[0])
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    inputs = [torch.randn(sum(sizes), *shape, generator=random).to(dtype) for shape in shapes]
    if wanted.get("sinks"):
        inputs.append(torch.randn(heads[0], generator=random).to(dtype))
    upstream = torch.randn(sum(sizes), heads[0], dims[1], generator=random).to(dtype)
    exact = [each.double().requires_grad_() for each in inputs]
    right = attend_slowly(*exact[:3], sizes, window=wanted.get("window"), sinks=exact[3] if exact[3:] else None)
    answers = [right, *torch.autograd.grad(right, exact, upstream.double())]
    mine = [each.to(device.CUDA).detach().requires_grad_() for each in inputs]
    slots = Slots(torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32), device.CUDA)
    out = PackedAttention(Scores(window=wanted.get("window")))(*mine[:3], slots, *mine[3:])
    found = [out, *torch.autograd.grad(out, mine, upstream.to(device.CUDA))]
    for value, answer in zip(found, answers, strict=True):
        off = float((value.detach().cpu().double() - answer.detach()).norm() / answer.detach().norm())
        assert off < (1e-6 if dtype == torch.float32 else 2e-2), (heads, dims, wanted, off)


def head_sizes() -> None:
    """Sizes that the kernel refuses are padded, or go another way before it is called."""
    from tests.gpu_pretended import kernels

    for size in (8, 20, 64, 100, 192, 256, 264):
        compare_attention([9, 3, 17], (4, 2), (size, size), HALF)
    assert set(kernels.FLASH_SIZES) == {8, 24, 64, 104, 192, 256}


def attention() -> None:
    """Grouped heads, windows, sinks and latent heads; the kernel's keys and values are those of the key heads."""
    from tests.gpu_pretended import kernels

    for dtype in (HALF, torch.float32):
        for heads in ((4, 4), (4, 2), (4, 1)):
            for wanted in ({}, {"window": 5}, {"sinks": True}, {"window": 3, "sinks": True}):
                compare_attention([9, 3, 17, 3], heads, (24, 24), dtype, **wanted)
    compare_attention([9, 3, 17], (4, 4), (24, 16), HALF)  # latent attention
    assert not kernels.SDPA["math"]
    assert kernels.REPEATED["keys"] == 0


def sums_of_experts() -> None:
    """bf16 sums of four experts have the same bits in every pass; Megatron's own differ with the atomics' order."""
    from megatron.core.transformer.moe import moe_utils

    from megalign.models import experts

    random = torch.Generator().manual_seed(3)
    tokens = torch.randn(65, 16, generator=random).to(HALF).to(device.CUDA)
    chosen = torch.zeros(65, 8, dtype=torch.bool).scatter_(1, torch.rand(65, 8, generator=random).topk(4).indices, True)
    chosen = chosen.to(device.CUDA)
    rows, _, token_R = experts.permute(tokens, chosen, None, 65 * 4)
    plain_rows, _, plain_R = moe_utils.permute(tokens, chosen, None, 65 * 4)
    assert torch.equal(rows.cpu(), plain_rows.cpu()) and torch.equal(token_R.cpu(), plain_R.cpu())
    rows = torch.randn(65 * 4, 16, generator=random).to(HALF).to(device.CUDA)

    def differ(unpermute: Callable[..., Tensor]) -> float:
        first, *others = (unpermute(rows, token_R, tokens.shape, routing_map=chosen) for _ in range(4))
        return max(float((first - other).abs().max()) for other in others)

    assert differ(moe_utils.unpermute) > 0.01
    assert differ(experts.unpermute) == 0.0
    right = torch.zeros(65, 16, dtype=torch.float64).index_add(0, token_R.cpu(), rows.cpu().double())
    mine = experts.unpermute(rows, token_R, tokens.shape, routing_map=chosen).cpu().double()
    torch.testing.assert_close(mine, right, rtol=4e-3, atol=1e-6)
    none = experts.unpermute(rows[:0], token_R[:0], torch.Size((0, 16)), routing_map=chosen[:0])
    assert none.shape == (0, 16)


def deterministic_mode() -> None:
    """What CUDA refuses in deterministic mode is refused here, and sampling does without it."""
    from megalign.rollout.transformers_sampler import pick

    random = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 1031, generator=random)
    uniform = torch.rand(3, dtype=torch.float64, generator=random)
    right = pick(logits, uniform, 0.7)
    torch.use_deterministic_algorithms(True)
    try:
        logits.to(device.CUDA).cumsum(0)
    except RuntimeError as error:
        assert "does not have a deterministic implementation" in str(error)
    else:
        raise AssertionError("cumsum of floats was not refused")
    found = pick(logits.to(device.CUDA), uniform.to(device.CUDA), 0.7)
    assert torch.equal(found[0].cpu(), right[0])
    torch.testing.assert_close(found[1].cpu(), right[1])


def keep(kept: list[Tensor], tensor: Tensor) -> Tensor:
    """Note a tensor that is saved for backward."""
    kept.append(tensor)
    return tensor


def norms() -> None:
    """RMSNorm of half precision keeps no fp32 copy for backward, and has fp32's values."""
    from types import SimpleNamespace

    from megalign.models.layers import RMSNorm

    random = torch.Generator().manual_seed(5)
    config: Any = SimpleNamespace(params_dtype=HALF, sequence_parallel=False)
    for offset, in_fp32 in ((0.0, False), (0.0, True), (1.0, True)):
        norm = RMSNorm(config, 48, 1e-6, offset=offset, in_fp32=in_fp32)
        norm.weight.data = torch.randn(48, generator=random).to(HALF)
        x, upstream = (torch.randn(17, 48, generator=random).to(HALF) for _ in range(2))
        exact = [x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()]
        right = exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + 1e-6) * (offset + exact[1])
        answers = [right, *torch.autograd.grad(right, exact, upstream.double())]
        norm.weight = torch.nn.Parameter(norm.weight.detach().to(device.CUDA))
        mine = x.to(device.CUDA).detach().requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda each: each):
            out = norm(mine)
        if in_fp32:  # the other form is torch's own kernel, which a CPU has not
            assert all(each.dtype == HALF or each.numel() <= len(x) for each in kept), [each.dtype for each in kept]
        found = [out, *torch.autograd.grad(out, [mine, norm.weight], upstream.to(device.CUDA))]
        for value, answer in zip(found, answers, strict=True):
            off = float((value.detach().cpu().double() - answer.detach()).norm() / answer.detach().norm())
            assert off < 1e-2, (offset, in_fp32, off)


def gradient_norm() -> None:
    """All tensors' norm takes no wait of the host, and is that of the tensors laid end to end."""
    from megalign.engines.megatron.grad_norm import norm_on_device

    tensors = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (3, 700, 41)]
    with device.waits() as waits:
        norm, _ = norm_on_device(
            0, torch.zeros(1), [[each.to(device.CUDA, non_blocking=True) for each in tensors]], False
        )
    assert not waits
    torch.testing.assert_close(norm.cpu(), torch.cat(tensors).norm().reshape(1))


def waits_of_a_step() -> None:
    """The host waits at most once a micro-batch and a few times a step, whatever the loss and the pass mode."""
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    import torch.distributed as dist

    from megalign.config.layout import Layout
    from megalign.convert import read_model_config
    from megalign.data.group import Response, TokenSequence
    from megalign.data.packing import Packing
    from megalign.engines.loss_inputs import StepBatch
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions
    from megalign.engines.scoring import Scored
    from megalign.engines.step import accumulate
    from megalign.losses.dpo import DpoConfig
    from megalign.losses.grpo import GrpoConfig
    from megalign.losses.gvpo import GvpoConfig
    from megalign.losses.sft import SftConfig
    from megalign.runtime.distributed import process_group
    from tests.support.tiny_jobs import VOCAB_SIZE, write_model

    random = torch.Generator().manual_seed(6)

    def sequence(number: int, role: Any) -> TokenSequence:
        ids = torch.randint(VOCAB_SIZE, (20,), generator=random).tolist()
        response = Response(tuple(ids[4:]), reward=float(number % 3))
        return TokenSequence(number, number // 2, role, tuple(ids[:4]), response)

    with tempfile.TemporaryDirectory() as folder, process_group(timeout_s=60):
        write_model(Path(folder))
        engine = MegatronEngine(
            read_model_config(Path(folder)),
            make_groups(Layout(), timeout_s=60),
            EngineOptions(torch.bfloat16, device.CUDA),
            adamw=AdamW(),
        )
        engine.load_weights(Path(folder))
        assert dist.is_initialized()
        samples = [sequence(number, "response") for number in range(8)]
        pairs = [replace(each, role=("chosen", "rejected")[at % 2]) for at, each in enumerate(samples)]
        known = [Scored(-10.0, torch.full((16,), -0.6), torch.zeros(16)) for _ in samples]
        steps = [
            (SftConfig(), samples, None),
            (GvpoConfig(), samples, "two_pass"),
            (GvpoConfig(), samples, "single_pass"),
            (DpoConfig(), pairs, "two_pass"),
            (GrpoConfig(beta=0.1), samples, "single_pass"),
            (GrpoConfig(beta=0.1), samples, "two_pass"),
        ]
        for loss, sequences, mode in steps:
            batch = StepBatch(sequences, num_groups=4, reference=known, old=known)
            accumulate(engine, batch, loss, packing=Packing(40), mode=mode)
            with device.waits() as waits:
                result = accumulate(engine, batch, loss, packing=Packing(40), mode=mode)
                engine.update(1e-3)
            micro_batches = 4  # of two sequences each
            assert mode in (None, result.pass_mode)
            # One where the loss needs a micro-batch's log-probs before its backward; the others are the step's: three
            # reads of all micro-batches, two sums over data ranks and a maximum, there and back, and the norm.
            needed = micro_batches if mode == "single_pass" else 0
            assert sum(waits.values()) <= needed + 10, (loss.name, mode, waits)
            in_layers = [line for line in waits if line.startswith(("models/", "ops/")) and "transfer.py" not in line]
            assert not in_layers, (loss.name, mode, in_layers)


CHECKS = {
    each.__name__: each
    for each in (head_sizes, attention, sums_of_experts, deterministic_mode, norms, gradient_norm, waits_of_a_step)
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    device.install()
    problems = dict.fromkeys(sys.argv[1:], "")
    for check in problems:
        try:
            CHECKS[check]()
        except Exception:
            problems[check] = traceback.format_exc()
        torch.use_deterministic_algorithms(False)
    print(json.dumps(problems))
