"""Every family's layers on a CUDA device against transformers on a CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import pack
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.runtime.distributed import process_group
from tests.support.families import FAMILY_CASES, PLAIN_CASES, write_family

pytestmark = pytest.mark.gpu


def expected_logp(folder: Path, sequences: list[TokenSequence]) -> torch.Tensor:
    """fp32; the flash and grouped kernels that transformers would choose do without some families' details."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    found = []
    with torch.no_grad():
        for one in sequences:
            ids = torch.tensor([[*one.prompt_ids, *one.response.ids]])
            rows = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(rows.gather(1, ids[0, 1:, None]).squeeze(1))
    return torch.cat(found)


def test_families_on_the_device(tmp_path: Path) -> None:
    """TF32 is off by default in torch; the tolerance is that of test_gpu_engine, for log-probs of the same size."""
    random = torch.Generator().manual_seed(5)
    tokens = [torch.randint(131, (length,), generator=random).tolist() for length in (37, 7, 16, 23, 2)]
    sequences = [TokenSequence(0, 0, "response", tuple(ids[:1]), Response(tuple(ids[1:]))) for ids in tokens]
    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(), timeout_s=60)
        for case in (*PLAIN_CASES, *FAMILY_CASES):
            folder = write_family(tmp_path / case, case)
            options = EngineOptions(dtype=torch.float32, device=world.device)
            engine = MegatronEngine(read_model_config(folder), groups, options, adamw=AdamW())
            engine.load_weights(folder)
            batch = pack(sequences, range(len(sequences)))
            (found,) = engine.forward([batch])
            right = expected_logp(folder, sequences)
            torch.testing.assert_close(
                found.logp_N.cpu(), right, rtol=0, atol=2e-3, msg=lambda text, case=case: f"{case}: {text}"
            )
            engine.backward([batch], lambda place, head: (head.logp()[0].sum(), None))
            assert 0 < engine.update(0.0) < float("inf"), case
