"""Post-training of language models on Megatron shards, with gradients that do not depend on how the work is cut."""

__version__ = "0.1.0"
