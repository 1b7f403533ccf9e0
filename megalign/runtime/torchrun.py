"""Runs N ranks of a Python program on this node by torch's elastic launcher, together with the job's other nodes.

Run: python -m megalign.runtime.torchrun N -m MODULE [arguments]        NNODES and its companions as nodes.py reads them
     python -m megalign.runtime.torchrun --refused CODE N -m MODULE [arguments]      ends it on the other nodes
Each rank's own message says what happened; this adds a line only where a rank could say none.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megalign.runtime.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from megalign.runtime.nodes import Nodes, nodes_of
from megalign.runtime.parent import Asked, end_with_parent, on_stop_signals
from megalign.runtime.status import RESULT_FILE, guarded, leave, write_result
from megalign.runtime.streams import lasting
from megalign.schema import UserError

REFUSAL_S = 10  # for the other nodes to come, of which all are started at about the same time
UNSAID = ("was ended by", "stopped by")  # a rank that was ended by a signal said nothing

if TYPE_CHECKING:
    from megalign.runtime.agent import Agent
    from megalign.runtime.meeting import Verdict


def main(arguments: Sequence[str]) -> int:
    """Start the ranks, restart them where that may help, and return the job's exit code."""

    def ask(number: int, _: object) -> None:
        raise Asked(signal.Signals(number).name)

    on_stop_signals(ask)
    end_with_parent()
    try:
        if arguments[0] == "--refused":
            return _refuse(nodes_of(os.environ), int(arguments[1]), int(arguments[2]), arguments[3:])
        return guarded(lambda: _run(nodes_of(os.environ), int(arguments[0]), arguments[1:]))
    except Asked as asked:
        print(f"launch: stopped by {asked} while no rank ran", file=sys.stderr, flush=True)
        write_result(STOPPED, replace=True)
        return STOPPED


def _alike(nodes: Nodes, ranks: int, command: Sequence[str]) -> dict[str, object]:
    """Return what must be the same on all nodes."""
    from megalign.runtime.meeting import COMMAND

    sizes = {"NNODES": nodes.count, "the number of ranks a node": ranks, "MAX_RESTARTS": nodes.max_restarts}
    return {COMMAND: list(command), **sizes}


def _refuse(nodes: Nodes, code: int, ranks: int, command: Sequence[str]) -> int:
    """End the job on the other nodes if they come soon, since this node's checks have refused it; return the code."""
    from torch.distributed import DistError

    from megalign.runtime.distributed import MeetingError
    from megalign.runtime.meeting import Meeting, Verdict

    nodes = replace(nodes, timeout_s=REFUSAL_S)
    with suppress(MeetingError, DistError, UserError):  # this node's own line and code are what counts here
        meeting = Meeting(nodes, _alike(nodes, ranks, command))
        why = "refused the job" if code == BAD_INPUT else "did not end well"
        meeting.end(Verdict(code, f"its checks {why}", nodes.name))
        meeting.await_join(REFUSAL_S)
        meeting.leave()
    return code


def _run(nodes: Nodes, ranks: int, command: Sequence[str]) -> int:
    """Meet the other nodes and run the ranks; return the job's exit code."""
    # Imported here: torch takes seconds, in which a signal may come.
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

    from megalign.runtime.agent import Agent
    from megalign.runtime.distributed import MeetingError
    from megalign.runtime.meeting import Meeting, Verdict

    # "failed (exitcode: 75)" of a job that was stopped on purpose, and advice for torchrun's own users.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the agent takes the others
    try:
        meeting = Meeting(nodes, _alike(nodes, ranks, command))
    except MeetingError as error:
        print(f"launch: {error}", file=sys.stderr, flush=True)
        write_result(FAILED, replace=True)
        return FAILED
    spec = WorkerSpec(
        role="default",
        local_world_size=ranks,
        rdzv_handler=meeting,
        entrypoint=sys.executable,
        args=("-u", *(word.replace("$", "$$") for word in command)),  # torch replaces "$$", as in templates
        max_restarts=nodes.max_restarts,
        master_addr=nodes.address,
        master_port=meeting.port,
    )
    given = os.environ.get(RESULT_FILE)
    # In the caller's folder, which it removes where this process is killed.
    beside = Path(given).parent if given else None
    with tempfile.TemporaryDirectory(prefix="megalign.", dir=beside) as logs:
        agent = Agent(nodes, spec, meeting, logs=logs, result=Path(given) if given else None)
        agent.take_signals()
        try:
            agent.run()
        except RendezvousClosedError:
            if meeting.verdict() is None:  # a node that ends the job says first how
                meeting.end(Verdict(FAILED, "a node closed the meeting and did not say why", nodes.name))
        except Asked as asked:
            meeting.end(Verdict(STOPPED, f"stopped by {asked}", nodes.name))
            raise
        except (MeetingError, RendezvousError, DistError) as error:
            meeting.end(Verdict(FAILED, str(error), nodes.name))
        finally:
            verdict = meeting.verdict()
            meeting.shutdown()
            meeting.leave()
    return _told(agent, verdict)


def _told(agent: Agent, verdict: Verdict | None) -> int:
    """Print what no rank of this node has said about the ending, and return the job's exit code."""
    if verdict is None:
        return DONE  # without a result, which the caller finds missing
    elsewhere, reported = verdict.node != agent.nodes.name, agent.held() is not None
    if elsewhere and not reported and verdict.code not in (DONE, STOPPED):
        print(f"launch: {verdict.node} ended the job with code {verdict.code}: {verdict.why}", file=sys.stderr)
    elif any(word in verdict.why for word in UNSAID) or (not reported and verdict.code not in (DONE, STOPPED)):
        print(f"launch: {verdict.why}", file=sys.stderr)
    write_result(verdict.code, replace=True)
    return verdict.code


if __name__ == "__main__":
    with lasting("stdout", "stderr"):
        leave(main(sys.argv[1:]))
