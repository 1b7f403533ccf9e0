"""Turn a Hugging Face checkpoint into a Megatron `torch_dist` one, which loads at any layout. Needs no GPU.

    python tools/hf_to_megatron.py HF_DIR OUT_DIR

HF_DIR may be hf://org/name. Exit code: 0, or 2 for wrong input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import guarded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dir", help="Hugging Face directory, or hf://org/name")
    parser.add_argument("out_dir", type=Path, help="new or empty directory")
    args = parser.parse_args()
    console = Console(stderr=True)
    quiet_libraries()

    def convert() -> int:
        # Imported here: Megatron takes seconds, and --help should not wait for it.
        from megalign.engines.offline import hf_to_megatron

        with console.status(f"{args.hf_dir} -> {args.out_dir}"):
            hf_to_megatron(args.hf_dir, args.out_dir)
        console.print(f"{args.out_dir} is written")
        return 0

    return guarded(convert)


if __name__ == "__main__":
    sys.exit(main())
