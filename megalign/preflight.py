"""Checks configuration and data in one plain process, for launchers that are about to start many.

Run: python -m megalign.preflight --ranks N CONFIG.yaml [key.sub=value ...]
"""

from __future__ import annotations

import argparse

from megalign.config import load_config
from megalign.config_file import hinted_run_dir
from megalign.runtime.command_line import Parser
from megalign.runtime.quiet import quiet_libraries
from megalign.runtime.status import DONE, guarded, leave, write_result
from megalign.schema import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 and one line where the job would refuse its input."""
    quiet_libraries()
    parser = Parser(usage="launch/torchrun.sh NPROC CONFIG.yaml [key.sub=value ...]", allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True, help="processes the job will have")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = argparse.Namespace(config=None)

    def run() -> int:
        parser.parse_args(arguments, args)
        cfg = load_config(args.config, args.overrides)
        # Imported here: it takes seconds, and a configuration that is wrong should not wait for them.
        from megalign.train.check import check
        from megalign.train.outputs import check_outputs, job_date, with_date

        try:
            cfg = with_date(cfg, job_date(cfg))
            check_outputs(cfg, check(cfg, args.ranks))
        except SystemExit as error:  # of a module that the checks import
            raise UserError(
                f"{args.config}: a module that it names ended the checks by sys.exit({error.code!r})"
            ) from None
        return DONE

    return guarded(run, lambda: args.config and hinted_run_dir(args.config, args.overrides))


if __name__ == "__main__":
    code = main()
    write_result(code, replace=True)  # without it, the launcher knows that the checks did not come to their end
    leave(code)
