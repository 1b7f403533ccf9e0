"""Steps over several pretended devices against transformers in one process on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalign.runtime.distributed import free_port
from tests.gpu_pretended.layout_steps import LAYOUTS
from tests.support.families import write_family
from tests.support.family_answers import answer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_over_several_devices(tmp_path: Path, name: str, dtype: str) -> None:
    _, ranks, case = LAYOUTS[name]
    source = write_family(tmp_path / case, case, dtype=getattr(torch, dtype))
    right = answer(source, torch.float32, gradients=True)
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu_pretended.layout_steps", str(tmp_path), name, dtype],
            cwd=ROOT,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [job.communicate(timeout=600)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * ranks, "\n".join(each[-3000:] for each in errors)
    found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    gap, total = (found["logp"] - right["logp"]).abs(), found["norm"]
    # Megatron's stages tell each other the shape of every message, which varies, by way of the device.
    waits = {line: number for line, number in found["waits"].items() if number and "p2p_communication" not in line}
    assert sum(waits.values()) <= (2 + 4 * ("moe" in case or "oss" in case)) * found["batches"], waits
    if dtype == "float32":
        assert float(gap.max()) < 1e-5 * float(right["logp"].abs().max())
        for key, gradient in right["gradients"].items():
            if key in found["gradients"]:
                scale = max(float(gradient.norm()), 1e-3 * total)
                assert float((found["gradients"][key] - gradient).norm()) < 2e-4 * scale, key
    else:
        rounded = answer(source, torch.bfloat16, gradients=False)["logp"]
        slack = 4.0 if "moe" in case or "oss" in case else 2.0
        assert float(gap.mean()) < slack * float((rounded - right["logp"]).abs().mean()) + 0.01
