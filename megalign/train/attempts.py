"""Notes the newest checkpoint at each start of a job, so that one that is requeued again and again ends some time."""

from __future__ import annotations

from pathlib import Path

from megalign.schema import UserError
from megalign.train.resume_point import latest


def why_give_up(file: Path, run_dir: Path, *, max_stalls: int) -> str:
    """Note this start in `file`; return one line if `max_stalls` starts before it have all made no checkpoint, else "".

    A line of the file names the run's newest checkpoint at a start, or is "none". 0 stalls: never give up.
    """
    found = latest(run_dir / "checkpoints")
    name = "none" if found is None else found.name
    try:
        before = file.read_text(encoding="utf-8").split() if file.exists() else []
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{name}\n")
    except OSError as error:
        raise UserError(f"--attempts is '{file}': {error.strerror}; must be a file that can be written") from None
    stalls = next((at for at, other in enumerate(reversed(before)) if other != name), len(before))
    if max_stalls == 0 or stalls < max_stalls:
        return ""
    since = "no checkpoint" if found is None else f"no checkpoint after {name}"
    return (
        f"the job has started {stalls} times and saved {since}; the log of each start says why it ended, and the job "
        f"may need a longer time limit or a smaller checkpoint.every; without {file} it would start again"
    )
