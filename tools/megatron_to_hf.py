"""Convert a Megatron checkpoint to Hugging Face: the command `megalign export`."""

from __future__ import annotations

import sys

from megalign.commands.export import main

if __name__ == "__main__":
    sys.exit(main(prog="tools/megatron_to_hf.py"))
