"""Compares a whole step with transformers' and TRL's, and tells where the device's time goes."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megalign.data.group import TokenSequence
from tests.gpu.first_hour_parts.device import CUDA, clock_problem, take_turns
from tests.gpu.first_hour_parts.models import QWEN2, SMALL_QWEN2, engine_of, ragged, write_model
from tests.gpu.first_hour_parts.report import Report, Skip

MOST_IDLE = 0.15  # of a step, between its first and its last kernel
KINDS = {  # of kernels, by words in their names; the first that fits
    "attention": r"flash|fmha|attention",
    "products": r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk",
    "optimizer": r"multi_tensor|adam",
    "copies": r"memcpy|memset|copy|catarray|gather|scatter|index",
    "reductions": r"reduce|norm|softmax|scan|sort",
    "element by element": r"elementwise|vectorized|triton",
}
Kernel = tuple[str, float, float]  # name, start and end in microseconds


def kinds_and_idle(kernels: Sequence[Kernel]) -> tuple[dict[str, float], float]:
    """Return (milliseconds by kind, share of the time from first to last kernel when none runs)."""
    by_kind: dict[str, float] = {}
    for name, start, end in kernels:
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), "others")
        by_kind[kind] = by_kind.get(kind, 0.0) + (end - start) / 1000
    busy, last = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda each: each[1]):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    span = last - min((start for _, start, _ in kernels), default=last)
    return dict(sorted(by_kind.items(), key=lambda each: -each[1])), 1 - busy / span if span > 0 else 0.0


def kernels_of(step: Callable[[], object]) -> list[Kernel]:
    """Profile a call and return what ran on the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def padded(sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, attention mask, labels) of padded rows; prompts are not labels."""
    length = max(map(len, sequences))
    ids, labels = torch.zeros(len(sequences), length, dtype=torch.int64), torch.full((len(sequences), length), -100)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(sequences):
        tokens = torch.tensor([*each.prompt_ids, *each.response.ids])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, len(each.prompt_ids) : len(tokens)] = tokens[len(each.prompt_ids) :]
    return ids.to(CUDA), mask.to(CUDA), labels.to(CUDA)


class Theirs:
    """Holds transformers' model of the same weights, and its SFT step over padded rows."""

    def __init__(self, folder: Path, micro_batches: Sequence[Sequence[TokenSequence]]) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(CUDA).train()
        self.rows = [padded(part) for part in micro_batches]
        self.scored = sum(each.num_scored for part in micro_batches for each in part)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def step(self) -> float:
        """Take a step of rate 0 and return its loss, the mean over scored tokens."""
        total = torch.zeros((), device=CUDA)
        for ids, mask, labels in self.rows:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            (loss / self.scored).backward()
            total += loss.detach() / self.scored
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


def our_step(engine: Any, sequences: Sequence[TokenSequence], budget: int) -> Callable[[], float]:
    """Return an SFT step of rate 0 over packed rows."""
    from megalign.data.packing import Packing
    from megalign.engines.loss_inputs import StepBatch
    from megalign.engines.step import accumulate
    from megalign.losses.sft import SftConfig

    batch = StepBatch(list(sequences), num_groups=len(sequences))

    def step() -> float:
        result = accumulate(engine, batch, SftConfig(), packing=Packing(budget))
        engine.update(0.0)
        return float(result.loss)

    return step


def profile(report: Report) -> None:
    """Time our step and transformers' turn by turn, and profile both."""
    sizes = SMALL_QWEN2 if report.small else QWEN2
    longest, count, parts = (40, 8, 2) if report.small else (1024, 32, 4)
    sequences = ragged(count, longest, sizes["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name), "qwen2", sizes, std=0.2 if report.small else 0.02)
        theirs = Theirs(folder, [sequences[part::parts] for part in range(parts)])
        with engine_of(folder) as engine:
            ours = our_step(engine, sequences, sum(map(len, sequences)) // parts)
            losses = ours(), theirs.step()
            found = f"{losses[0]:.4f} and {losses[1]:.4f}"
            near = abs(losses[0] - losses[1]) < 5e-3 * abs(losses[1])
            report.check("loss, ours and transformers'", near, expected="equal within 0.5 %", found=found)
            problem = clock_problem()
            if problem is None:
                measure(report, {"ours": ours, "transformers' on padded rows": theirs.step})
            else:
                report.skip("times and profile", problem)


def measure(report: Report, ways: dict[str, Callable[[], object]]) -> None:
    """Time steps turn by turn and profile each; the first is ours, which is held to the limits."""
    times = take_turns(ways, rounds=2 if report.small else 7)
    for way, took in times.items():
        report.figure(f"{way}: ms a step", round(took, 1))
        by_kind, idle = kinds_and_idle(kernels_of(ways[way]))
        report.figure(f"{way}: ms by kind", {kind: round(value, 1) for kind, value in by_kind.items()})
        if way == "ours" and not report.small:
            report.within("ours: share of the step with an idle device", idle, MOST_IDLE)
        else:
            report.figure(f"{way}: share of the step with an idle device", round(idle, 3))
    ours, theirs = times.values()
    hold_ratio(report, "our step over transformers'", ours / theirs)


def hold_ratio(report: Report, name: str, ratio: float) -> None:
    """Note a ratio of times, which must not be above one; of small sizes it says nothing."""
    if report.small:
        report.figure(name, round(ratio, 2))
    else:
        report.within(name, ratio, 1.0)


def beside_trl(report: Report) -> None:
    """Time our SFT step and TRL's on the same sequences, one after the other, on the same device."""
    import trl  # noqa: F401  where it is missing, this part is skipped

    problem = clock_problem()
    if problem is not None:
        raise Skip(problem)
    from tests.support.tiny_jobs import write_tokenizer

    sizes = SMALL_QWEN2 if report.small else QWEN2
    longest, count, parts = (40, 8, 2) if report.small else (1024, 32, 4)
    sequences = ragged(count, longest, sizes["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", "qwen2", sizes)
        write_tokenizer(folder)
        theirs = trl_seconds(folder, sequences, parts, steps=3 if report.small else 8)
        torch.cuda.empty_cache()
        with engine_of(folder) as engine:
            step = our_step(engine, sequences, sum(map(len, sequences)) // parts)
            ours = take_turns({"ours": step}, rounds=3 if report.small else 7)["ours"] / 1000
    report.figure("TRL: ms a step", round(1000 * theirs, 1))
    report.figure("ours: ms a step", round(1000 * ours, 1))
    hold_ratio(report, "our step over TRL's", ours / theirs)


def trl_seconds(
    folder: Path, sequences: Sequence[TokenSequence], parts: int, *, steps: int, on_cpu: bool = False
) -> float:
    """Return the median time of TRL's steps after two, over the same sequences in as many micro-batches."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": [*each.prompt_ids, *each.response.ids],
            "completion_mask": [0] * len(each.prompt_ids) + [1] * len(each.response.ids),
        }
        for each in sequences
    ]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *rest: Any, **more: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            times.append(-time.perf_counter())

        def on_step_end(self, *rest: Any, **more: Any) -> None:
            if not on_cpu:
                torch.cuda.synchronize()
            times[-1] += time.perf_counter()

    config = SFTConfig(
        output_dir=str(folder.parent / "trl"), max_steps=steps, per_device_train_batch_size=len(rows) // parts,
        gradient_accumulation_steps=parts, gradient_checkpointing=False, bf16=True, learning_rate=0.0,
        max_length=None, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=on_cpu,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    SFTTrainer(
        model=str(folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    ).train()
    return statistics.median(times[2:])
