"""Runs the command `rollout`: samples and rewards responses of a Hugging Face checkpoint and writes them as JSONL."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megalign.config import JobConfig
from megalign.rollout.prompts import Prompt, round_prompts
from megalign.rollout.rewards import call_limit_s, choose_reward
from megalign.rollout.rounds import Gather, rollout_round, write_groups
from megalign.schema import UserError

ROLLOUT_FILE = "rollout.jsonl"


def load_sampler(hf_dir: Path, *, dtype: str, device: torch.device) -> Any:
    """Load the checkpoint as a plain `transformers` model; dtype as in `run.dtype`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # a log gets every state of a bar as a line
    model = AutoModelForCausalLM.from_pretrained(
        str(hf_dir),
        config=sampler_config(hf_dir),
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.to(device)


def sampler_config(hf_dir: Path) -> Any:
    """Read the checkpoint's `transformers` configuration without padding token, which may have no embedding."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(hf_dir), local_files_only=True, trust_remote_code=False)
    config.pad_token_id = None
    return config


def write_rollouts(
    cfg: JobConfig,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Sample all rounds with the same weights and write `RUN_DIR/rollout.jsonl`, which `data.path` accepts.

    The same seed draws the same samples as in the first round of `train`. Rank 0 writes, after the last round; an
    earlier file of that name is kept as `rollout.<n>.jsonl`.
    """
    rollout = cfg.rollout
    if rollout is None:
        raise UserError("rollout is missing; the command rollout needs the section")
    reward = choose_reward(rollout.reward)
    records: list[dict[str, Any]] = []
    for round_number in range(rollout.rounds):
        result = rollout_round(
            model,
            tokenizer,
            round_prompts(
                prompts, seed=cfg.run.seed, round_number=round_number, prompts_per_round=rollout.prompts_per_round
            ),
            reward=reward,
            k=rollout.k,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=cfg.run.seed,
            round_number=round_number,
            rank=rank,
            num_ranks=num_ranks,
            gather=gather,
            reward_limit_s=call_limit_s(cfg.watchdog.timeout_s),
        )
        records += result.records
        shown = ", ".join(f"{name} {value:.3g}" for name, value in result.stats.items())
        if rank == 0:
            report(f"round {round_number + 1} of {rollout.rounds}: {shown}")
    path = Path(cfg.run.dir) / ROLLOUT_FILE
    if rank == 0:
        if path.exists():
            numbers = (number for number in itertools.count(1) if not path.with_suffix(f".{number}.jsonl").exists())
            report(f"earlier groups are kept in {path.rename(path.with_suffix(f'.{next(numbers)}.jsonl'))}")
        write_groups(path, records)
        report(f"{len(records)} groups in {path}")
    return path
