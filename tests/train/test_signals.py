"""Jobs of two ranks that a signal reaches before their first step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.processes import run_ranks
from tests.support.tiny_jobs import metrics, records, status, write_config, write_lines, write_model


def signalled_while_scoring(config: str, run_dir: str) -> None:
    """Rank 1 gets a signal while the reference is scored, and then both ranks take the same command to its end.

    Before that, rank 1 gets one while it imports the program, when the ranks have just met.
    """
    from megalign.__main__ import Command, main

    load, rank_1 = Command.load, os.environ["RANK"] == "1"

    def signal_and_load(command: Command) -> Callable[..., Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(command)

    if rank_1:
        Command.load = signal_and_load  # type: ignore[method-assign]
    assert main(["train", config]) == 75
    Command.load = load  # type: ignore[method-assign]
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)

    log = Path(run_dir, "log.txt")

    def signal_when_data_are_read() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (log.is_file() and "training data: " in log.read_text()):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    if rank_1:
        threading.Thread(target=signal_when_data_are_read).start()
    assert main(["train", config]) == 75
    held = status(Path(run_dir))
    assert held == {"code": 75, "reason": "stopped by a signal to another rank before the first step", "step": None}
    assert not Path(run_dir, "metrics.jsonl").exists() and not Path(run_dir, "checkpoints").exists()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    assert main(["train", config, "run.steps=2"]) == 0


def test_a_signal_while_scores_are_made_ends_all_ranks_with_75(tmp_path):
    write_model(tmp_path / "model")
    write_lines(tmp_path / "data.jsonl", records("samples", 600))
    config = write_config(tmp_path, run={"steps": 200})
    run_ranks(signalled_while_scoring, 2, str(config), str(tmp_path / "run"), timeout_s=120)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert status(tmp_path / "run")["code"] == 0
