"""Convert a Hugging Face checkpoint to Megatron: the command `megalign convert`."""

from __future__ import annotations

import sys

from megalign.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(prog="tools/hf_to_megatron.py"))
