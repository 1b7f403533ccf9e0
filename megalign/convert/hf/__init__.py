"""Reads and writes Hugging Face checkpoints, config.json and weight files, a tensor at a time."""
