"""Runs a job by a launcher that is not this package's: checks it in one process first, and exits with its own code.

Run: python -m megalign.runtime.checked_job --ranks N CONFIG.yaml [key.sub=value ...] -- LAUNCHER [arguments]
The launcher's command must end by `megalign.runtime.rank_keeper`, which gets the rest: train CONFIG.yaml and the keys.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.command_line import Parser, whole_number
from megalign.runtime.exit_codes import DONE
from megalign.runtime.launch import Status, check_job, job_code, run_process
from megalign.runtime.parent import set_parent_death_signal
from megalign.runtime.status import RESULT_FILE, guarded, write_result
from megalign.runtime.streams import lasting

KEEPER = ["-m", "megalign.runtime.rank_keeper"]


def main(arguments: Sequence[str]) -> int:
    """Check and run the job; return its exit code."""
    parser = Parser(prog="checked_job", allow_abbrev=False)
    parser.add_argument("--ranks", type=whole_number, required=True, help="processes of the whole job")
    parser.add_argument("--forwards", action="store_true", help="the launcher passes SIGUSR1 on to all ranks")
    end = list(arguments).index("--")

    def run() -> int:
        args, job = parser.parse_known_args(arguments[:end])
        return _run(args, job, list(arguments[end + 1 :]))

    with lasting("stdout", "stderr"):
        return guarded(run)


def _run(args: argparse.Namespace, job: list[str], launcher: list[str]) -> int:
    status = Status(hinted_run_dir(job[0], job[1:]))
    with tempfile.TemporaryDirectory(prefix="megalign.") as folder:
        # On another machine this folder is missing: a rank there writes only status.json.
        result = Path(folder, "code")
        environment = {**os.environ, RESULT_FILE: str(result)}
        code = check_job(args.ranks, job, environment, result)
        if code == DONE:
            result.unlink()
            command = [*launcher, "train", *job]
            code, asked = run_process(
                command,
                environment,
                stop=_signal_launcher if args.forwards else _stop_keepers,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal would reach the launcher, which kills its ranks
                close_fds=False,  # deepspeed.sh hands a file on
                preexec_fn=partial(set_parent_death_signal, signal.SIGUSR1 if args.forwards else signal.SIGTERM),
            )
            code = job_code(result, code, asked, "the ranks", status)
    write_result(code, replace=True)  # for a script that has started this one
    return code


def _signal_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """Send the signal that mpirun passes on; SIGTERM would make it kill the ranks."""
    launcher.send_signal(signal.SIGUSR1)


def _stop_keepers(launcher: subprocess.Popen[bytes]) -> None:
    """Signal this machine's ranks, of which one is enough; without any, the launcher."""
    import psutil

    keepers = []
    with suppress(psutil.Error):
        for process in psutil.Process(launcher.pid).children(recursive=True):
            words = process.cmdline()
            if KEEPER in (words[at : at + 2] for at in range(len(words))):
                keepers.append(process)
    for process in keepers:
        with suppress(psutil.Error):
            process.terminate()
    if not keepers:
        launcher.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
