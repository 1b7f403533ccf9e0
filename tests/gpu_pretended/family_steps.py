"""Takes steps of families on the pretended device: `python -m tests.gpu_pretended.family_steps FOLDER FILE CASE ...`.

FOLDER/CASE has the checkpoint in fp32 and bf16. What was found goes into FILE by (case, dtype): log-probs,
norms of two equal steps, gradients by stored name, weights after the update, the host's waits; or the error's text.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu_pretended import device

LR = 1e-3


def take_step(folder: Path, dtype: torch.dtype, groups: Any) -> dict[str, Any]:
    """Score, take the gradient in two forms, and update; weights and gradients by stored name."""
    from megalign.convert import hf_state, read_model_config
    from megalign.data.micro_batch import pack
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.shard import EngineOptions
    from tests.gpu_pretended import kernels
    from tests.support.family_answers import sequences

    engine = MegatronEngine(read_model_config(folder), groups, EngineOptions(dtype, device.CUDA), adamw=AdamW())
    engine.load_weights(folder)
    for chunk in engine.shard.chunks:
        assert all(isinstance(each, device.Pretend) for each in chunk.parameters())
    batch = pack(sequences(), range(len(sequences())))
    engine.forward([batch])  # what is made once a job is made here
    before = {name: each.detach().cpu().clone() for name, each in engine.hf_tensors()}
    kernels.SDPA.clear()
    with device.waits() as waits:
        (first,) = engine.forward([batch])
    back_ends = dict(kernels.SDPA)
    (second,) = engine.forward([batch])
    norms = []
    forms = (
        lambda place, head: (head.logp().logp_N.sum(), None),
        lambda place, head: (head.weighted(torch.ones_like(first.logp_N), first.lse_N)[0], None),
    )
    gradients: dict[str, torch.Tensor] = {}
    for form in forms:
        engine.backward([batch], form)
        if not gradients:
            gradients = {name: each.cpu() for name, each in hf_state(engine.shard.model, engine.full_tensors("grad"))}
        norms.append(engine.update(0.0))
    engine.backward([batch], forms[0])
    engine.update(LR)
    return {
        "logp": first.logp_N.cpu(),
        "pass_gap": float((first.logp_N - second.logp_N).abs().max()),
        "gradients": gradients,
        "norms": norms,
        "weights": {name: each.detach().cpu().clone() for name, each in engine.hf_tensors()},
        "before": before,
        "waits": dict(waits),
        "expert_layers": sum(len(chunk.routers) for chunk in engine.shard.chunks),
        "back_ends": back_ends,
    }


def main(folder: Path, file: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device.install()
    from megalign.config.layout import Layout
    from megalign.engines.megatron.groups import make_groups

    groups = make_groups(Layout(), timeout_s=60)
    found: dict[tuple[str, str], Any] = {}
    for case in cases:
        for name in ("float32", "bfloat16"):
            try:
                found[case, name] = take_step(folder / case / name, getattr(torch, name), groups)
            except Exception:
                found[case, name] = traceback.format_exc()
    torch.save(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
