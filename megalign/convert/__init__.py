"""Hugging Face checkpoints to Megatron shards and back, one table a family."""
