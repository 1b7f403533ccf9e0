"""Turn a Megatron checkpoint of a run, or of hf_to_megatron.py, into a Hugging Face one. Needs no GPU.

    python tools/megatron_to_hf.py CKPT_DIR OUT_HF_DIR

CKPT_DIR is for example RUN_DIR/checkpoints/step_00000100. Exit code: 0, or 2 for wrong input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory")
    parser.add_argument("out_dir", type=Path, help="new or empty directory")
    args = parser.parse_args()
    console = Console(stderr=True)
    quiet_libraries()

    def convert() -> int:
        # Imported here: Megatron takes seconds, and --help should not wait for it.
        from megalign.engines.offline import megatron_to_hf

        columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed} tensors"), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"{args.checkpoint} -> {args.out_dir}", total=None)
            megatron_to_hf(args.checkpoint, args.out_dir, progress=lambda done: bar.update(task, completed=done))
        console.print(f"{args.out_dir} is written")
        return 0

    return guarded(convert)


if __name__ == "__main__":
    sys.exit(main())
