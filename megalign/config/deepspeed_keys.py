"""List DeepSpeed's settings that `engine.deepspeed_config` may pass through, and those that it may not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

ALWAYS = "megalign sets it itself"
BATCHES = "micro-batches come from data.tokens_per_micro_batch and data.groups_per_step"
CHANGES = "it changes the numbers of the run"
LOGGED = "metrics.jsonl and trackers have what is measured"
SAVED = "checkpoint and export say what is written"
ZERO = "zero_optimization"
# Dotted keys, whole sections among them, that megalign sets from its own keys or that would change what is computed.
DEEPSPEED_OWNED: dict[str, str] = {
    **dict.fromkeys(
        (
            "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
            "managed_gradient_accumulation", "dataloader_drop_last",
        ),
        BATCHES,
    ),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "data_types", "torch_autocast", "amp"), "set it with run.dtype"),
    **dict.fromkeys(
        (
            "gradient_allreduce_op", "communication_data_type", "seq_parallel_communication_data_type",
            "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer", "disable_allgather", "disable_python_gc", "compile", "hybrid_engine",
            "vocabulary_size", "datastates", "graph_harvesting",
            f"{ZERO}.ignore_unused_parameters", f"{ZERO}.compute_grad_norm", f"{ZERO}.legacy_stage1",
            f"{ZERO}.override_module_apply", f"{ZERO}.save_muon_momentum_buffer_in_memory",
            # The head is gathered apart from the module that this would gather whole.
            f"{ZERO}.stage3_module_granularity_threshold",
            f"{ZERO}.zero_hpz_partition_size", f"{ZERO}.offload_optimizer.ratio",
            f"{ZERO}.offload_optimizer.super_offload", f"{ZERO}.offload_optimizer.cpuadam_cores_perc",
        ),
        ALWAYS,
    ),
    **dict.fromkeys(
        (
            "compression_training", "weight_quantization", "quantize_training", "eigenvalue", "sparse_attention",
            "progressive_layer_drop", f"{ZERO}.zenflow", f"{ZERO}.zero_quantized_weights",
            f"{ZERO}.zero_quantized_nontrainable_weights", f"{ZERO}.zero_quantized_gradients",
        ),
        CHANGES,
    ),
    **dict.fromkeys(
        (
            "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "comms_logger",
            "flops_profiler", "timers", "monitor_config",
        ),
        LOGGED,
    ),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "set it with trackers"),
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), "the data section says what is trained in which order"),
    **dict.fromkeys(
        (
            "checkpoint", "nebula", f"{ZERO}.load_from_fp32_weights", f"{ZERO}.elastic_checkpoint",
            f"{ZERO}.pipeline_loading_checkpoint", f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
            f"{ZERO}.stage3_gather_fp16_weights_on_model_save", f"{ZERO}.gather_16bit_weights_on_model_save",
        ),
        SAVED,
    ),
    **dict.fromkeys(("autotuning", "elasticity"), "the launcher and the parallel section set ranks"),
    **dict.fromkeys(
        ("pipeline", "expert_parallel", "use_data_before_expert_parallelism"),
        "engine.name megatron has pipeline and expert parallelism",
    ),
    "optimizer": "set it with the optimizer section",
    "scheduler": "set it with optimizer.schedule",
    "gradient_clipping": "set it with optimizer.clip_norm",
    "tensor_parallel": "set it with parallel.tensor",
    "sequence_parallel_size": "set it with parallel.context",
    "activation_checkpointing": "set it with engine.recompute",
    f"{ZERO}.stage": "set it with engine.zero.stage",
    **dict.fromkeys((f"{ZERO}.cpu_offload", f"{ZERO}.cpu_offload_use_pin_memory"), "set engine.zero.offload_optimizer"),
    f"{ZERO}.cpu_offload_param": "set it with engine.zero.offload_params",
}  # fmt: skip


# Settings that may pass through: they affect speed and memory, not the model's function or layout.
DEEPSPEED_SETTINGS = (
    *(
        f"{ZERO}.{key}"
        for key in (
            "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
            "leaf_module", "log_trace_cache_warnings", "memory_efficient_linear", "overlap_comm", "parameter_alignment",
            "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage3_allgather_sequential",
            "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
            "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce",
        )
    ),
    *(
        f"{ZERO}.offload_optimizer.{key}"
        for key in (
            "buffer_count", "device", "fast_init", "nvme_path", "pin_memory", "pipeline_read", "pipeline_write",
        )
    ),
    *(
        f"{ZERO}.offload_param.{key}"
        for key in ("buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory")
    ),
    *(
        f"aio.{key}"
        for key in (
            "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit", "use_gds",
        )
    ),
)  # fmt: skip
SECTIONS = {key.rpartition(".")[0] for key in DEEPSPEED_SETTINGS} | {f"{ZERO}.leaf_module"}
OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}  # DeepSpeed's section: our key


def entries(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in nested settings, sections before what they hold."""
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from entries(value, f"{prefix}{key}.")


def owned_problem(settings: Mapping[str, Any]) -> tuple[str, Any, str] | None:
    """Return (dotted key, value, what to set instead) of the first setting that megalign owns; None without one."""
    for key, value in entries(settings):
        if key in DEEPSPEED_OWNED:
            return key, value, DEEPSPEED_OWNED[key]
    return None


def may_pass(key: str) -> bool:
    """Return whether a dotted key, or section of keys, may pass through."""
    return key in SECTIONS or key in DEEPSPEED_SETTINGS or fnmatch.fnmatch(key, f"{ZERO}.leaf_module.*")
