"""Importing this package registers every family."""

from megalign.convert.families import llama, mistral, qwen2, qwen3

__all__ = ["llama", "mistral", "qwen2", "qwen3"]
