"""Compare the logits of two Hugging Face checkpoints: the command `megalign compare`."""

from __future__ import annotations

import sys

from megalign.commands.compare import main

if __name__ == "__main__":
    sys.exit(main(prog="tools/compare_logits.py"))
