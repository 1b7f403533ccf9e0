"""Runs one rank below mpirun or the deepspeed launcher, whose signals and exit codes mean something else to them.

They send signals to the helpers of a rank too, which write checkpoints, and end all ranks as soon as one has ended by a
code that is not 0. So the rank has a session of its own here, gets each signal as SIGTERM, upon which it saves, and its
code 75 is 0 to the launcher: it saved, and others may still save. MEGALIGN_RESULT_FILE and status.json have the code.

Run: python -m megalign.runtime.rank_keeper train CONFIG.yaml [key.sub=value ...]     (megalign's arguments)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

from megalign.runtime.parent import on_stop_signals, set_parent_death_signal
from megalign.runtime.streams import lasting

DONE, STOPPED = 0, 75  # of megalign.runtime.status, which would import what this small process does not need
LAST_WORD_S = 3.0  # for other ranks to say what they saw, before they are ended
LOCAL_RANK = "--local_rank="  # first argument below the deepspeed launcher; LOCAL_RANK says the same
RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def main(arguments: Sequence[str]) -> int:
    """Run the rank to its end and return the code that the launcher may see."""
    asked: list[int] = []
    rank: subprocess.Popen[bytes] | None = None

    def ask(number: int, _: object) -> None:
        asked.append(number)
        if rank is not None:
            rank.terminate()

    on_stop_signals(ask)
    words = [word for word in arguments if not word.startswith(LOCAL_RANK)]
    command = [sys.executable, "-u", "-m", "megalign", *words]
    # MPI's processes speak with mpirun through an open file; a rank lost by its keeper would hold its device.
    end_with_keeper = partial(set_parent_death_signal, signal.SIGKILL)
    rank = subprocess.Popen(command, start_new_session=True, close_fds=False, preexec_fn=end_with_keeper)
    if asked:
        rank.terminate()
    return _ended(rank.wait(), asked=bool(asked))


def _ended(code: int, *, asked: bool) -> int:
    """Return a rank's code as the launcher may see it, or end as the launcher needs it to end the other ranks."""
    if code in (DONE, STOPPED) or (asked and code == -signal.SIGTERM):  # before training began
        return DONE
    if code < 0:
        number = next((os.environ[name] for name in RANK_NAMES if name in os.environ), "0")
        print(f"launch: rank {number} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
    if "PMI_RANK" not in os.environ:
        return code if code > 0 else 128 - code
    # MPICH's mpirun ends the others only where one was ended by a signal.
    time.sleep(LAST_WORD_S)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return code


if __name__ == "__main__":
    with lasting("stderr"):
        sys.exit(main(sys.argv[1:]))
