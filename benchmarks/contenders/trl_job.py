"""Trains with TRL's SFTTrainer or DPOTrainer and notes the ends of the steps; imports nothing of megalign.

Started by benchmarks.engines, once a rank, in the environment that has TRL:
    python -m benchmarks.contenders.trl_job OUTPUT STEPS SETTINGS.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.clock import Clock

# Elements of a bucket, as in megalign: DeepSpeed's own 5e8 would take 2 GB.
BUCKET = 50_000_000


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """Return what a user writes into DeepSpeed's file for fp32 on CPUs; the rest follows the trainer's arguments."""
    zero = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {
        **dict.fromkeys((*automatic, "gradient_clipping"), "auto"),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def use_deepspeed() -> None:
    """Prepare DeepSpeed for CPUs: its collectives would be compiled, which takes minutes; gloo serves."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # Before the model is built: ZeRO-3 would count one process.
    deepspeed.init_distributed("gloo")


def arguments_of(cfg: dict[str, Any], steps: int, folder: str) -> dict[str, Any]:
    """Return the arguments that both trainers share."""
    world = int(os.environ["WORLD_SIZE"])
    shared = {
        "output_dir": folder,
        "model_init_kwargs": {"dtype": "float32"},
        "max_length": cfg["max_length"],
        "max_steps": steps,
        "per_device_train_batch_size": cfg["batch"],
        "gradient_accumulation_steps": max(1, cfg["micro_batches"] // world),
        "learning_rate": cfg["lr"],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if world > 1:
        shared["ddp_backend"] = "gloo"
    if cfg["zero"]:
        shared["deepspeed"] = deepspeed_settings(cfg["zero"])
    return shared


def main(arguments: Sequence[str]) -> int:
    """Train by the settings."""
    steps, folder = int(arguments[1]), os.environ["SCRATCH"]
    cfg = json.loads(Path(arguments[2]).read_text(encoding="utf-8"))
    if cfg["zero"]:
        use_deepspeed()
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    seen: list[int] = []
    clock = Clock(Path(arguments[0]), steps)
    base = SFTTrainer if cfg["loss"] == "sft" else DPOTrainer

    class Counting(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            return super().training_step(model, inputs, *rest, **more)

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *rest: Any, **more: Any) -> None:
            clock.step(sum(seen))
            seen.clear()

    shared = arguments_of(cfg, steps, folder)
    if cfg["loss"] == "sft":
        config = SFTConfig(**shared, packing=cfg["packing"])
    else:
        config = DPOConfig(**shared, precompute_ref_log_probs=cfg["precompute"])
    trainer = Counting(
        model=cfg["model"],
        args=config,
        train_dataset=load_dataset("json", data_files=cfg["data"], split="train", cache_dir=folder),
        processing_class=AutoTokenizer.from_pretrained(cfg["model"]),
        callbacks=[Note()],
    )
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
