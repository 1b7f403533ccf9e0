"""Checks that two passes of experts in bf16 have the same bits."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from tests.gpu.first_hour_parts.models import EXPERTS, SMALL_EXPERTS, engine_of, ragged, write_model
from tests.gpu.first_hour_parts.report import Report

SAMPLES = 4  # responses of a group


def experts(report: Report) -> None:
    """Take two-pass steps of GVPO with four experts a token; the passes' log-probs must be equal."""
    from megalign.data.packing import Packing
    from megalign.engines.loss_inputs import StepBatch
    from megalign.engines.scoring import Scored
    from megalign.engines.step import accumulate
    from megalign.losses.gvpo import GvpoConfig

    sizes = SMALL_EXPERTS if report.small else EXPERTS
    longest, count = (40, 8) if report.small else (700, 32)
    samples = [
        replace(each, group=index // SAMPLES, response=replace(each.response, reward=float(index % SAMPLES)))
        for index, each in enumerate(ragged(count, longest, sizes["vocab_size"]))
    ]
    reference = [Scored(-10.0 * each.num_scored) for each in samples]
    batch = StepBatch(samples, num_groups=count // SAMPLES, reference=reference)
    with tempfile.TemporaryDirectory() as folder, engine_of(write_model(Path(folder), "qwen3_moe", sizes)) as engine:
        for number in range(2 if report.small else 4):
            packing = Packing(6 * longest)
            result = accumulate(engine, batch, GvpoConfig(), packing=packing, mode="two_pass")
            assert result.pass_gap is not None
            report.within(f"step {number + 1}: pass_gap", result.pass_gap, 0.0)
            norm = engine.update(1e-4)
            finite = norm is not None and 0 < norm < float("inf")
            report.check(f"step {number + 1}: gradient norm", finite, expected="finite, above 0", found=norm)
