"""List Megatron-Core's settings that `engine.megatron` may pass through, and those that it may not."""

from __future__ import annotations

NO_DROPOUT = "dropout must be 0, its default here: the two passes of a step must compute the same function"
FROM_MODEL = "it comes from the config.json in model.path"
ALWAYS = "megalign sets it itself"
# Fields that the engine sets from our own keys; a second source for the same number could disagree.
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


# Settings that may pass through: they affect speed and memory, not the model's function or layout.
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
