"""The sections of a job's configuration, apart from those of `data` and `loss`, which their own layers declare.

Keys that belong to a later version are known already and accept their default alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megalign.schema import NoneWord, PathText, Strict, Text, UserError, hub_hint, shorten

Pair = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def only(default: Any) -> AfterValidator:
    """Refuse every value but the default of a key that a later version opens."""

    def check(value: Any) -> Any:
        if value != default:
            raise ValueError(f"this version supports only {json.dumps(default)}")
        return value

    return AfterValidator(check)


def is_checkpoint_dir(path: str) -> bool:
    """Whether `path` looks like a Hugging Face checkpoint on this machine."""
    return (Path(path) / "config.json").is_file()


class RunConfig(Strict):
    dir: PathText
    seed: NonNegativeInt = 0
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    max_minutes: Annotated[PositiveFloat | None, NoneWord] = None
    max_bad_steps: NonNegativeInt = 0
    max_pass_gap: NonNegativeFloat | Literal["auto"] = "auto"
    dump_steps: list[PositiveInt] = []
    deterministic: bool = False


class ModelSection(Strict):
    path: PathText
    aux_loss_coefficient: NonNegativeFloat = 0.0


class EvalConfig(Strict):
    path: Annotated[PathText | None, NoneWord] = None
    every: NonNegativeInt = 0

    @model_validator(mode="after")
    def _complete(self) -> EvalConfig:
        if self.every and self.path is None:
            raise UserError(f"eval.path is missing; eval.every is {self.every}, so it is required")
        return self


class ReferenceConfig(Strict):
    """`source` is None only until the job has put its loss's default there."""

    source: PathText | None = None
    cache_dir: Annotated[PathText | None, NoneWord, only(None)] = None

    @field_validator("source")
    @classmethod
    def _known(cls, source: str | None) -> str | None:
        if source is None or source in ("initial", "none", "round_start") or source.startswith("hf://"):
            return source
        if is_checkpoint_dir(source):
            return source
        raise ValueError(
            "must be initial, none, round_start, hf://org/name or an existing Hugging Face directory with a config.json"
            + hub_hint(source)
        )


class TeacherConfig(Strict):
    name: Text
    path: PathText


class RolloutConfig(Strict):
    path: PathText
    rounds: PositiveInt
    prompts_per_round: PositiveInt
    k: PositiveInt
    temperature: PositiveFloat = 1.0
    max_new_tokens: PositiveInt
    updates_per_round: PositiveInt
    reward: Text


class ScheduleConfig(Strict):
    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0


class OptimizerSection(Strict):
    lr: NonNegativeFloat
    betas: Annotated[tuple[Fraction, Fraction], Pair] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: Annotated[PositiveFloat | None, NoneWord] = 1.0
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _downward(self) -> OptimizerSection:
        if self.schedule.min_lr > self.lr:
            raise UserError(
                f"optimizer.schedule.min_lr is {self.schedule.min_lr}: must be at most optimizer.lr {self.lr}"
            )
        return self


class ParallelConfig(Strict):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1
    sequence: bool = False


class LoraConfig(Strict):
    """Adapters on linear layers, by their names in Hugging Face checkpoints."""

    rank: PositiveInt
    alpha: PositiveFloat
    targets: Annotated[list[LoraTarget], Field(min_length=1)] = list(get_args(LoraTarget))

    @field_validator("targets")
    @classmethod
    def _once(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) < len(targets):
            raise ValueError("every name may be there once")
        return targets


class ZeroConfig(Strict):
    stage: Literal[1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_params: bool = False


NO_DROPOUT = "dropout must be 0, which is what it is without this key: the two passes must compute the same function"
FROM_MODEL = "it comes from the config.json in model.path"
ALWAYS = "megalign sets it itself"
# What the engine hands to Megatron from our own keys; a second source for one number would let them disagree.
MEGATRON_OWNED: dict[str, str] = {
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), NO_DROPOUT),
    **dict.fromkeys(
        (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "layernorm_epsilon", "normalization", "gated_linear_unit", "activation_func", "add_bias_linear",
            "add_qkv_bias", "qk_layernorm", "window_size", "softmax_scale", "rotary_base", "vocab_size",
            "max_sequence_length", "share_embeddings_and_output_weights",
        ),
        FROM_MODEL,
    ),
    **dict.fromkeys(
        (
            "calculate_per_token_loss", "variable_seq_lengths", "grad_scale_func",
            "finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func", "timers",
            "use_cpu_initialization", "perform_initialization", "expert_tensor_parallel_size",
            "microbatch_group_size_per_vp_stage", "moe_router_load_balancing_type", "moe_router_dtype",
            "moe_token_dispatcher_type", "moe_expert_capacity_factor", "moe_z_loss_coeff", "moe_grouped_gemm",
        ),
        ALWAYS,
    ),
    **dict.fromkeys(
        (
            "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_layer_freq",
            "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
        ),
        FROM_MODEL,
    ),
    **dict.fromkeys(
        (
            "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
        ),
        "layers are split evenly, with fewer on the first and last stage; for a split of your own use "
        "pipeline_model_parallel_layout",
    ),
    **dict.fromkeys(("bf16", "fp16", "params_dtype", "pipeline_dtype", "autocast_dtype"), "set it with run.dtype"),
    "tensor_model_parallel_size": "set it with parallel.tensor",
    "pipeline_model_parallel_size": "set it with parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "set it with parallel.virtual_pipeline",
    "context_parallel_size": "set it with parallel.context",
    "expert_model_parallel_size": "set it with parallel.expert",
    "sequence_parallel": "set it with parallel.sequence",
    "recompute_granularity": "set it with engine.recompute",
    "transformer_impl": "set it with engine.layers",
    "deterministic_mode": "set it with run.deterministic",
    "moe_aux_loss_coeff": "set it with model.aux_loss_coefficient",
}  # fmt: skip


# What may pass through: settings of speed and memory, which leave the model's function and its layout alone.
MEGATRON_SETTINGS = (
    "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
    "persist_layer_norm", "memory_efficient_layer_norm", "fp8*", "fp4*", "first_last_layers_bf16",
    "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "tp_comm_*", "tp_only_amax_red", "cpu_offloading*",
    "overlap_p2p_comm*", "batch_p2p_*", "deallocate_pipeline_outputs", "defer_embedding_wgrad_compute",
    "wgrad_deferral_limit", "recompute_method", "recompute_num_layers", "recompute_modules",
    "distribute_saved_activations", "attention_softmax_in_fp32", "attention_backend", "cuda_graph_*",
    "use_te_rng_tracker", "delay_wgrad_compute", "barrier_with_L1_time", "fine_grained_activation_offloading",
    "offload_modules", "min_offloaded_tensor_size", "pipeline_model_parallel_layout", "cp_comm_type",
    "moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap",
    # of the data-parallel wrapper
    "grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather", "align_param_gather",
    "check_for_nan_in_grad", "check_for_large_grads", "bucket_size", "pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation", "fp8_param_gather", "nccl_ub", "disable_symmetric_registration",
)  # fmt: skip


class EngineConfig(Strict):
    name: Annotated[Literal["megatron", "deepspeed"], only("megatron")] = "megatron"
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    chunk_tokens: PositiveInt | Literal["auto"] = "auto"
    tp_invariant: bool = False
    head_kernel: Annotated[str, only("torch")] = "torch"
    zero: ZeroConfig = ZeroConfig()
    megatron: dict[str, Any] = {}
    deepspeed_config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> EngineConfig:
        for key, value in self.megatron.items():
            if key in MEGATRON_OWNED:
                raise UserError(f"engine.megatron.{key} is {shorten(value)}: {MEGATRON_OWNED[key]}")
        if self.zero != ZeroConfig():
            raise UserError(f"engine.zero is {self.zero!r}: only engine.name deepspeed reads it; leave it out")
        if self.deepspeed_config:
            shown = shorten(self.deepspeed_config)
            raise UserError(f"engine.deepspeed_config is {shown}: only engine.name deepspeed reads it; leave it out")
        return self


class CheckpointConfig(Strict):
    every: NonNegativeInt = 0
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    async_save: Annotated[bool, only(False)] = Field(default=False, alias="async")
    resume: PathText = "auto"
    allow: list[Text] = []  # keys or sections in which a resumed job may differ from the one that saved

    @field_validator("resume")
    @classmethod
    def _known(cls, resume: str) -> str:
        named = Path(resume)
        if resume in ("auto", "never") or named.is_dir() or (named.name == "latest" and named.is_file()):
            return resume
        raise ValueError("must be auto, never or an existing checkpoint directory")


class ExportConfig(Strict):
    hf_dir: Annotated[PathText | None, NoneWord] = None
    every: NonNegativeInt = 0

    @model_validator(mode="after")
    def _complete(self) -> ExportConfig:
        if self.every and self.hf_dir is None:
            raise UserError(f"export.hf_dir is missing; export.every is {self.every}, so it is required")
        return self


class WatchdogConfig(Strict):
    timeout_s: PositiveFloat = 600.0
