"""Runs the command launch: trains on N processes of each machine, after checking configuration and data in one.

Run: python -m megalign launch N CONFIG.yaml [key.sub=value ...]      nodes.py says what NNODES and its companions mean
Its exit code is the job's (0 done, 2 bad input, 75 stopped by a signal after saving), which torchrun alone loses.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from megalign.config.yaml_file import hinted_run_dir
from megalign.runtime.command_line import Parser, program, whole_number
from megalign.runtime.exit_codes import DONE, FAILED, STOPPED
from megalign.runtime.nodes import nodes_of
from megalign.runtime.parent import PARENT, adopt_orphans, await_orphans, on_stop_signals
from megalign.runtime.status import RESULT_FILE, guarded, write_result
from megalign.runtime.streams import lasting

ORPHANS_S = 600.0  # for ranks whose agent was killed to finish their step and save
Stop: TypeAlias = Callable[["subprocess.Popen[bytes]"], None]


def main(arguments: Sequence[str]) -> int:
    """Launch the ranks and return the job's exit code."""
    parser = Parser(
        prog=f"{program()} launch",
        usage=f"{program()} launch N CONFIG.yaml [key.sub=value ...]",
        description="train by a configuration on N processes of each machine, after checking it and the data in one",
        allow_abbrev=False,
    )
    parser.add_argument("ranks", metavar="N", type=whole_number, help="number of processes")
    parser.add_argument("config", metavar="CONFIG.yaml", help="YAML file; after it keys to set, as key.sub=value")

    def run() -> int:
        args = parser.parse_args(arguments[:2])  # the checks parse the rest
        return launch(args.ranks, arguments[1:])

    with lasting("stdout", "stderr"):
        return guarded(run)


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Check the job in one process, then run `train` on `ranks` processes of each node; return the job's exit code."""
    nodes = nodes_of(os.environ)
    adopt_orphans()
    status = Status(hinted_run_dir(arguments[0], arguments[1:]))
    with tempfile.TemporaryDirectory(prefix="megalign.") as folder:
        # The processes write the job's code here: the run directory may hold another run's code, and into a pipe a
        # reward's module could print.
        result = Path(folder, "code")
        environment = {**os.environ, RESULT_FILE: str(result), PARENT: str(os.getpid())}
        # torchrun would set one thread, with a long warning; divide the cores among the ranks instead.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
        code = check_job(ranks * nodes.count, arguments, environment, result)
        agent, train = ["-m", "megalign.runtime.torchrun"], [str(ranks), "-m", "megalign", "train", *arguments]
        if code == DONE:
            result.unlink()
            # In a session of its own: Ctrl-C in a terminal reaches this process alone, which then stops the ranks.
            code, asked = run_process([sys.executable, *agent, *train], environment, start_new_session=True)
            if code > 128:  # the agent was killed, and its ranks save and end
                await_orphans(ORPHANS_S)
            code = job_code(result, code, asked, "the ranks", status)
        elif nodes.count > 1:
            run_process([sys.executable, *agent, "--refused", str(code), *train], environment)
    write_result(code, replace=True)  # for a script that has started this launcher
    return code


def check_job(ranks: int, arguments: Sequence[str], environment: dict[str, str], result: Path) -> int:
    """Check a job of that many ranks in one plain process, which ends with this one; return the exit code.

    result: the file that `environment` names as MEGALIGN_RESULT_FILE.
    """
    command = [sys.executable, "-m", "megalign.preflight", "--ranks", str(ranks), *arguments]
    own = {**environment, PARENT: str(os.getpid())}
    return job_code(result, *run_process(command, own, stdout=sys.stderr.fileno()), "the checks")


class Status:
    """Reads the code of `status.json`, if this job has written it: not what an earlier run has left there."""

    def __init__(self, run_dir: str | None) -> None:
        self.path = None if run_dir is None else Path(run_dir, "status.json")
        self.before = self._identity()

    def _identity(self) -> tuple[int, int] | None:
        """Return what differs between two files of the same name, without comparing clocks of machines."""
        try:
            found = self.path.stat() if self.path else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns) if found else None

    def code(self) -> int | None:
        """Return the code that this job has written there, if any."""
        if self.path is None or self._identity() in (None, self.before):
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self.path.read_text(encoding="utf-8"))["code"])
        return None


def run_process(
    command: list[str], environment: dict[str, str], *, stop: Stop = subprocess.Popen.terminate, **options: Any
) -> tuple[int, str]:
    """Run a process to its end; `stop` passes a signal on to it, by default as SIGTERM.

    Returns its exit code, 128 + n for signal n, and the name of the first signal that was passed on, if any.
    """
    asked: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(signal.Signals(number).name)
        for process in started:
            stop(process)

    before = on_stop_signals(pass_on)
    try:
        started.append(subprocess.Popen(command, env=environment, **options))
        if asked:
            stop(started[0])
        code = started[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code, asked[0] if asked else ""


def job_code(file: Path, code: int, asked: str, who: str, status: Status | None = None) -> int:
    """Return the code in the result file, else the one in `status`; without both the process's own, or FAILED for 0.

    asked: the signal that the process was stopped by, if any; then, without a result, there was nothing to save.
    """
    if file.exists():
        return int(file.read_text())
    written = None if status is None else status.code()
    if written is not None:
        return written
    if asked:
        print(f"launch: {who} were stopped by {asked}", file=sys.stderr)
        return STOPPED
    ended = f"signal {code - 128}" if code > 128 else f"exit code {code}"
    print(f"launch: {who} ended early, by {ended}; a module that the job loads may have done it", file=sys.stderr)
    return code or FAILED
