"""Agrees on rank 0's address by MPI, in a process of its own beside each rank.

A rank that loaded MPI itself would keep its signal handlers, memory hooks and warnings of forks, and could not end by a
time-out: mpi4py holds Python's lock while MPI_Init waits for a rank that died.

Run: python -m megalign.runtime.mpi_meeting SIZE "WHAT RANK 0 SAYS"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megalign.runtime.parent import end_with_parent

ANSWER = "megalign-meeting:"  # begins the line with the answer; MPI libraries may print others


def main(arguments: Sequence[str]) -> int:
    """Print what rank 0 says, on every rank; return 1, after one line on stderr, where MPI does not work."""
    size, word = int(arguments[0]), arguments[1]
    end_with_parent()
    import mpi4py

    mpi4py.rc(initialize=False, finalize=False)
    try:
        from mpi4py import MPI as library
    except (ImportError, RuntimeError) as error:
        print("mpi4py does not find an MPI library:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    library.Init()
    world = library.COMM_WORLD
    if world.Get_size() != size:
        used = library.Get_library_version().split(",")[0].split("\n")[0]
        print(f"mpi4py uses another MPI library ({used}) than mpirun", file=sys.stderr)
        return 1
    answer = world.bcast(word if world.Get_rank() == 0 else None, root=0)
    library.Finalize()
    print(f"{ANSWER}{answer}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
