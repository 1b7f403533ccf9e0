"""Keeps the sampled groups that have both a right answer and a worse one.

Run: python launch/quickstart/keep_solved.py rollout.jsonl groups.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Copy the groups of `source` that have a right answer and a worse one, and say how many."""
    lines = source.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        rewards = [response["reward"] for response in json.loads(line)["responses"]]
        if min(rewards) < max(rewards) == 1:
            kept.append(line + "\n")
    target.write_text("".join(kept), encoding="utf-8")
    print(f"{len(kept)} of {len(lines)} groups have a right answer and a worse one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
