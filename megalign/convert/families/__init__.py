"""Importing this package registers every family."""

from megalign.convert.families import llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe

__all__ = ["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]
