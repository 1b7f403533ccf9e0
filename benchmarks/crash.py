"""Kills ranks of a job that restarts itself, and compares what it leaves with a run that nothing disturbed.

    python -m benchmarks.crash [--kills 40] [--seed 0] [--keep DIR]

A GVPO job on two tensor ranks by two stages under launch/torchrun.sh with MAX_RESTARTS. Each job is killed five times:
SIGKILL of a random rank at a random moment while models are loaded, scores are made, steps are taken, a checkpoint is
written and the model is exported. Every other job writes its checkpoints beside training (`checkpoint.async`). Exits 1
unless all jobs end with 0 by themselves, with every step once in metrics.jsonl, with the undisturbed run's numbers and,
bit for bit, its weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.support.crash import PHASES, compare, crash, start, write_job


def main() -> int:
    """Run the jobs one after another and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="directory for the runs; without it they are removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as made:
        folder = args.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder, args.kills, random.Random(args.seed))


def run(folder: Path, kills: int, draw: random.Random) -> int:
    """Kill `kills` times in all; return the exit code."""
    configs = [write_job(folder / name, **{"async": name == "async"}) for name in ("sync", "async")]
    plain = folder / "plain"
    if start(configs[0], plain, restarts=0).wait() != 0:
        print(f"the undisturbed job failed: {plain.with_suffix('.txt')}")
        return 1
    done, failed, began = 0, 0, time.monotonic()
    while done < kills:
        number = done // len(PHASES)
        config, run_dir = configs[number % 2], folder / f"run_{number}"
        result = crash(config, run_dir, PHASES[: kills - done], draw)
        problems = result.problems or compare(run_dir, plain)
        failed += bool(problems)
        done += max(1, len(result.kills))
        shown = "; ".join(problems) or "as undisturbed"
        print(f"{config.parent.name}: killed while {', '.join(result.kills)}: code {result.code}, {shown}", flush=True)
    print(f"{done} kills, {failed} jobs failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
