"""Converts Hugging Face checkpoints to Megatron shards and back, with one table of rules per model family."""

from megalign.convert.hf.config import read_model_config
from megalign.convert.hf.reader import audit, load_shard, resolve_model
from megalign.convert.hf.writer import HFWriter
from megalign.convert.naming import hf_parts, hf_state, megatron_names, shard, unshard

__all__ = [
    "HFWriter",
    "audit",
    "hf_parts",
    "hf_state",
    "load_shard",
    "megatron_names",
    "read_model_config",
    "resolve_model",
    "shard",
    "unshard",
]
