"""A rank without a model, for tests of launchers: it meets the others, and does what the environment says.

VICTIM's rank leaves the result FAILED and ends itself by KILL_SIGNAL, or with EXIT_CODE, in the attempts before number
DEATHS. SECONDS to sleep.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from megalign.runtime.distributed import process_group
from megalign.runtime.exit_codes import FAILED
from megalign.runtime.parent import end_with_parent
from megalign.runtime.status import write_result


def main() -> None:
    """Meet the other ranks, fail if asked, meet again and print a line."""
    end_with_parent()
    asked = {name: int(os.environ.get(name, "-1")) for name in ("VICTIM", "KILL_SIGNAL", "EXIT_CODE", "DEATHS")}
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with process_group(timeout_s=60) as world:
        value = torch.ones(1)
        dist.all_reduce(value)
        if world.rank == asked["VICTIM"] and attempt < asked["DEATHS"]:
            write_result(FAILED, replace=True)
            if asked["KILL_SIGNAL"] > 0:
                os.kill(os.getpid(), asked["KILL_SIGNAL"])
            os._exit(asked["EXIT_CODE"])
        print(f"sleeping: rank {world.rank}", flush=True)
        time.sleep(float(os.environ.get("SECONDS", "0")))
        dist.all_reduce(value)
        print(f"attempt {attempt}, rank {world.rank} of {world.size}, sum {value.item():g}, {sys.argv[1:]}", flush=True)


if __name__ == "__main__":
    main()
