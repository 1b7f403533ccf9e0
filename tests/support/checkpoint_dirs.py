"""Directories that look like checkpoints of a run, made without an engine."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megalign.engines.saving import listing
from megalign.train.checkpoint import write_latest
from megalign.train.checkpoint_facts import FORMAT, Facts
from megalign.train.checkpoint_files import FILES, file_sizes

FACTS_OF_RUN = Facts("megatron", "torch.float32", optimizer=True, job={"data": {}})


def describe_files(folder: Path) -> dict[str, list[int]]:
    """Sizes and checksums of every other file in a folder, as FILES lists them."""
    return listing(folder, list(file_sizes(folder)))


def write_checkpoint(run_dir: Path, step: int, *, point: bool = True, **facts: Any) -> Path:
    """Write a whole checkpoint of a few small files; `point`: let `latest` name it."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    (folder / "hf").mkdir(parents=True)
    said = {"format": FORMAT, **asdict(replace(FACTS_OF_RUN, **facts))}
    (folder / "checkpoint.json").write_text(json.dumps(said))
    for name in ("metadata.json", "hf/config.json"):
        (folder / name).write_text("{}")
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * 8192)  # 2 MiB: a large file
    (folder / FILES).write_text(json.dumps(describe_files(folder)))
    if point:
        write_latest(folder.parent, folder.name)
    return folder
