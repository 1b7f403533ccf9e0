"""Compare two checkpoints tensor by tensor: the command `megalign verify`."""

from __future__ import annotations

import sys

from megalign.commands.verify import main

if __name__ == "__main__":
    sys.exit(main(prog="tools/verify_checkpoint.py"))
