"""Reads and writes Megatron checkpoints without Megatron."""
