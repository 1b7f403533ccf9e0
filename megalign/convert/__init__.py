"""Hugging Face checkpoints to Megatron shards and back, one table a family."""

from megalign.convert.hf_config import read_model_config
from megalign.convert.model_config import ModelConfig, MoeConfig
from megalign.convert.naming import hf_parts, hf_state, megatron_names, unshard
from megalign.convert.reader import audit, load_shard, resolve_model
from megalign.convert.writer import HFWriter, check_target, companions

__all__ = [
    "HFWriter",
    "ModelConfig",
    "MoeConfig",
    "audit",
    "check_target",
    "companions",
    "hf_parts",
    "hf_state",
    "load_shard",
    "megatron_names",
    "read_model_config",
    "resolve_model",
    "unshard",
]
