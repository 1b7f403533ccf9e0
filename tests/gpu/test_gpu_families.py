"""Every family's layers on a CUDA device against transformers on a CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.data.micro_batch import pack
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.runtime.distributed import process_group
from tests.support.families import FAMILY_CASES, PLAIN_CASES, write_family
from tests.support.family_answers import answer, sequences

pytestmark = pytest.mark.gpu


def test_families_on_the_device(tmp_path: Path) -> None:
    """TF32 is off by default in torch; the tolerance is that of test_gpu_engine, for log-probs of the same size."""
    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(), timeout_s=60)
        for case in (*PLAIN_CASES, *FAMILY_CASES):
            folder = write_family(tmp_path / case, case)
            options = EngineOptions(dtype=torch.float32, device=world.device)
            engine = MegatronEngine(read_model_config(folder), groups, options, adamw=AdamW())
            engine.load_weights(folder)
            batch = pack(sequences(), range(len(sequences())))
            (found,) = engine.forward([batch])
            right = answer(folder, torch.float32, gradients=False)["logp"]
            torch.testing.assert_close(
                found.logp_N.cpu(), right, rtol=0, atol=2e-3, msg=lambda text, case=case: f"{case}: {text}"
            )
            engine.backward([batch], lambda place, head: (head.logp()[0].sum(), None))
            assert 0 < engine.update(0.0) < float("inf"), case
