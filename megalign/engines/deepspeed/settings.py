"""Builds the dictionary that DeepSpeed is started with, from the job's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalign.config.job import JobConfig

# Elements of a bucket: 200 MB in fp32 saturate a network; DeepSpeed's own 5e8 would take 2 GB of each GPU.
BUCKET = 50_000_000


def ds_config(cfg: JobConfig, *, zero_size: int, on_cuda: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings for ZeRO over `zero_size` ranks, with `engine.deepspeed_config` on top.

    Accumulation is the engine's own, and losses have every divisor inside, so gradients are summed over ranks. ZeRO-3
    only averages: there the engine multiplies by the number of ranks.
    """
    settings: dict[str, Any] = {
        # One micro-batch a step for DeepSpeed, whose own accumulation is off: only the product is checked.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.optimizer.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": cfg.run.dtype == "bf16", "check_grad_overflow": True},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device at every pass
        "zero_optimization": _zero(cfg, zero_size=zero_size, on_cuda=on_cuda),
    }
    if cfg.engine.zero.stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    return merged(settings, cfg.engine.deepspeed_config)


def _zero(cfg: JobConfig, *, zero_size: int, on_cuda: bool) -> dict[str, Any]:
    """Return the section `zero_optimization`."""
    zero = cfg.engine.zero
    # Overlap needs a second stream, which a CPU does not have, and ranks to communicate with.
    overlap = on_cuda and zero_size > 1 and zero.stage > 1
    section: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": overlap,
        # A single rank has nothing to bring together; DeepSpeed reduces what exceeds a bucket where it lies.
        "reduce_bucket_size": BUCKET if zero_size > 1 or zero.offload_optimizer else 1,
        "allgather_bucket_size": BUCKET,
        "reduce_scatter": zero.stage == 3,  # before stage 3 DeepSpeed implements it by a sum with two more copies
    }
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    if zero.offload_params:
        section["offload_param"] = {"device": "cpu", "pin_memory": on_cuda}
    return section


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with `changes` on top, section by section."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result
