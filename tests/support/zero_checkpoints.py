"""Checkpoints of the DeepSpeed engine, written by hand from a transformers model: no DeepSpeed, any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megalign.convert.hf.companions import copy_hf_files
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.zero.files import Fragment, Index, write_index, write_part

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def state_of(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return {name: {kind: flat values}}, with a state that follows from the name."""
    random = torch.Generator().manual_seed(0)
    return {
        name: {"weight": value.detach().float().flatten()}
        | {kind: torch.randn(value.numel(), generator=random) for kind in KINDS[1:]}
        for name, value in values.items()
    }


def write_zero(
    folder: Path,
    values: Mapping[str, Tensor],
    *,
    ranks: int,
    max_file_bytes: int = 10**9,
    source: Path | None = None,
) -> Path:
    """Write parameters in as many uneven parts, cut in the middle of tensors; return the folder."""
    folder.mkdir(parents=True)
    state = state_of(values)
    total = sum(value.numel() for value in values.values())
    edges = [total * rank * rank // (ranks * ranks) for rank in range(ranks + 1)]
    files: list[str] = []
    for rank in range(ranks):
        fragments, offset = [], 0
        for name, kinds in state.items():
            size = kinds["weight"].numel()
            low, high = (min(max(edge - offset, 0), size) for edge in edges[rank : rank + 2])
            if low < high:
                fragments.append(Fragment(name, low, {kind: flat[low:high] for kind, flat in kinds.items()}))
            offset += size
        files += write_part(folder, rank, fragments, max_file_bytes=max_file_bytes)
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in values.items()}
    write_index(folder, Index(specs, KINDS, 7, ranks, tuple(files), None if source is None else str(source)))
    return folder


def write_run(
    folder: Path,
    hf_dir: Path,
    values: Mapping[str, Tensor],
    *,
    adapters: Mapping[str, object] | None = None,
    base: str | None = None,
) -> Path:
    """Write what export needs of a run's checkpoint that trained `values` from `hf_dir`; return the folder."""
    write_zero(folder / "zero", values, ranks=3, source=hf_dir)
    copy_hf_files(hf_dir, folder / "hf")
    dtype = str(next(iter(values.values())).dtype)
    facts = {"format": 1, "engine": "deepspeed", "dtype": dtype, "adapters": adapters, "base": base or str(hf_dir)}
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    return folder
