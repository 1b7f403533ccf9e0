"""Checks configuration and data in one plain process, for launchers that are about to start many.

Run: python -m megalign.preflight --ranks N CONFIG.yaml [key.sub=value ...]
Prints the run directory, whose status.json then holds the job's exit code.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout

from megalign.config import load_config
from megalign.config_file import hinted_run_dir
from megalign.runtime.status import guarded
from megalign.train.check import check
from megalign.train.outputs import check_outputs


def main() -> int:
    """Exit code 2 and one line where the job would refuse its input."""
    parser = argparse.ArgumentParser(prog="python -m megalign.preflight", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True, help="processes the job will have")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()

    def run() -> int:
        cfg = load_config(args.config, args.overrides)
        with redirect_stdout(sys.stderr):  # a reward's module may print, and stdout is the launcher's
            check_outputs(cfg, check(cfg, args.ranks))
        print(cfg.run.dir)
        return 0

    return guarded(run, lambda: hinted_run_dir(args.config, args.overrides))


if __name__ == "__main__":
    sys.exit(main())
