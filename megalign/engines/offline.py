"""Whole checkpoints between Hugging Face and Megatron's `torch_dist` format, in one process without a GPU.

What is written loads at any layout; nothing here asks for one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from megalign.convert import HFWriter, ModelConfig, audit, check_target, hf_state, read_model_config, resolve_model
from megalign.engines import megatron_state
from megalign.engines.groups import make_groups
from megalign.engines.megatron import EngineOptions, MegatronEngine
from megalign.engines.peft_export import add_adapter
from megalign.models.lora import Lora
from megalign.runtime.distributed import process_group
from megalign.schema import UserError

STORED = {"BF16": torch.bfloat16, "F32": torch.float32}
TIMEOUT_S = 600.0


def hf_to_megatron(hf_dir: str, out_dir: Path) -> None:
    """Write a Hugging Face checkpoint as a Megatron one, in the dtype it is stored in; nothing half-written stays.

    Raises UserError for a checkpoint that is damaged or unknown, or a target that is not new or empty.
    """
    source = resolve_model(hf_dir)
    model = read_model_config(source)
    dtype = _stored_dtype(source, model)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not empty; needed: a new or empty directory")
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with process_group(timeout_s=TIMEOUT_S):
            engine = _whole_engine(model, dtype)
            engine.load_weights(source)
            engine.save(partial, {})
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def megatron_to_hf(checkpoint: Path, out_dir: Path, *, progress: Callable[[int], None] = lambda done: None) -> None:
    """Write a checkpoint of a run, or of `hf_to_megatron`, as a Hugging Face directory; `progress` counts tensors.

    Adapters are merged, and lie beside in PEFT's format.

    Raises UserError for a directory that is no checkpoint of ours, or a target that is not new or empty.
    """
    source = checkpoint / megatron_state.HF_FILES
    if not (checkpoint / "metadata.json").is_file() or not (source / "config.json").is_file():
        needed = "a directory with metadata.json and hf/config.json, such as RUN_DIR/checkpoints/step_00000100"
        raise UserError(f"{checkpoint} is not a megalign checkpoint; needed: {needed}")
    model = read_model_config(source)
    check_target(out_dir, source, overwrite=False)
    with process_group(timeout_s=TIMEOUT_S):
        dtype = getattr(torch, megatron_state.about(checkpoint)["dtype"].removeprefix("torch."))
        lora = megatron_state.saved_lora(checkpoint)
        engine = _whole_engine(model, dtype, lora)
        engine.load(checkpoint)
        with HFWriter(out_dir, source=source, dtype=None) as writer:
            for done, (name, tensor) in enumerate(hf_state(model, engine.full_tensors()), start=1):
                writer.add(name, tensor)
                progress(done)
            if lora is not None:
                add_adapter(writer, engine, lora)


def _whole_engine(model: ModelConfig, dtype: torch.dtype, lora: Lora | None = None) -> MegatronEngine:
    """The whole model on one rank, on the CPU, without an optimizer."""
    assert dist.get_world_size() == 1
    groups = make_groups(tensor=1, pipeline=1, timeout_s=TIMEOUT_S)
    options = EngineOptions(dtype=dtype, device=torch.device("cpu"), lora=lora)
    return MegatronEngine(model, groups, options, adamw=None)


def _stored_dtype(source: Path, model: ModelConfig) -> torch.dtype:
    """The one dtype of the checkpoint's tensors."""
    found: dict[str, str] = {}
    for name, path in audit(source, model).items():
        with safe_open(path, framework="pt") as file:
            found.setdefault(file.get_slice(name).get_dtype(), name)
    if len(found) != 1 or next(iter(found)) not in STORED:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(found.items()))
        raise UserError(f"{source} stores tensors as {listed}; allowed: all BF16 or all F32")
    return STORED[next(iter(found))]
