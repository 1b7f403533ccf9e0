"""Checks configuration and data in a single process, before a launcher starts many.

Run: python -m megalign.preflight --ranks N CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalign.config.job import load_config
from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.command_line import Parser, program
from megalign.runtime.exit_codes import DONE, FAILED
from megalign.runtime.parent import end_with_parent
from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import guarded, leave, write_result
from megalign.schema import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the job's checks; return 2, after printing one line, if the job would refuse its input."""
    quiet_libraries()
    parser = Parser(usage=f"{program()} launch N CONFIG.yaml [key.sub=value ...]", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True, help="processes the job will have")
    parser.add_argument("--attempts", metavar="FILE", help="note this start of a job that may be requeued in FILE")
    parser.add_argument("--max-stalls", type=int, default=3, help="starts without a new checkpoint before giving up")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = argparse.Namespace(config=None, overrides=[])

    def run() -> int:
        parser.parse_args(arguments, args)
        cfg = load_config(args.config, args.overrides)
        # Imported here: it takes seconds, and a configuration that is wrong should not wait for them.
        from megalign.train.check import check
        from megalign.train.outputs import check_outputs, job_date, with_date

        try:
            cfg = with_date(cfg, job_date(cfg))
            check_outputs(cfg, check(cfg, args.ranks))
        except SystemExit as error:  # raised by a module that the checks import
            raise UserError(
                f"{args.config}: a module that it names ended the checks by sys.exit({error.code!r})"
            ) from None
        if args.attempts is not None:
            return note_attempt(Path(args.attempts), Path(cfg.run.dir), max_stalls=args.max_stalls)
        return DONE

    return guarded(run, lambda: hinted_run_dir(args.config, args.overrides))


def note_attempt(file: Path, run_dir: Path, *, max_stalls: int) -> int:
    """Note the start of an attempt in `file`; return 1, after printing why, if the job makes no progress."""
    from megalign.train.attempts import why_give_up

    problem = why_give_up(file, run_dir, max_stalls=max_stalls)
    if problem:
        print(f"megalign: failed: {problem}", file=sys.stderr, flush=True)
    return FAILED if problem else DONE


if __name__ == "__main__":
    end_with_parent()
    code = main()
    write_result(code, replace=True)  # without a result, the launcher knows that the checks did not finish
    leave(code)
