"""Reads and writes the weights and optimizer state of a ZeRO run as safetensors files, without DeepSpeed."""
