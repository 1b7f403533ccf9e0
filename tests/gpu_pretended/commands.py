"""megalign's command line on the pretended device: `python -m tests.gpu_pretended.commands FILE`, FILE a JSON list of
command lines, run one after another; prints their exit codes as JSON."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.gpu_pretended import device


def main(file: Path) -> None:
    torch.set_num_threads(1)
    import transformers  # noqa: F401  before there is a device: it asks for CUDA's properties when imported

    device.install()
    from megalign.__main__ import main as megalign

    codes = []
    for command in json.loads(file.read_text()):
        codes.append(megalign(command))
        gc.collect()  # ends the job's process groups
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
