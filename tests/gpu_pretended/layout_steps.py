"""One rank of a job over pretended devices: `python -m tests.gpu_pretended.layout_steps FOLDER LAYOUT CASE`.

Rank and world size come from the environment, as a launcher sets them. Log-probs (of the last stage) and gradients go
into FOLDER/LAYOUT.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.gpu_pretended import device

LAYOUTS = {
    "tp2+sp+ep2": ({"tensor": 2, "expert": 2, "sequence": True}, 2, "qwen3-moe"),
    "cp2": ({"context": 2}, 2, "mistral"),
    "cp2 sinks": ({"context": 2}, 2, "gpt-oss"),
    "pp2xvpp2": ({"pipeline": 2, "virtual_pipeline": 2}, 2, "qwen2"),
}


def main(folder: Path, name: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    axes, _, case = LAYOUTS[name]
    device.install()
    from megalign.config.layout import Layout
    from megalign.convert import hf_state, read_model_config
    from megalign.data.micro_batch import pack
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions
    from megalign.runtime.distributed import process_group
    from tests.support.family_answers import sequences

    with process_group(timeout_s=120) as world:
        assert world.device.type == "cuda"
        groups = make_groups(Layout(**axes), timeout_s=120)
        options = EngineOptions(dtype, device.CUDA)
        engine = MegatronEngine(read_model_config(folder / case), groups, options, adamw=AdamW())
        engine.load_weights(folder / case)
        shape, count = engine.shape, 2 if groups.virtual_size > 1 else 1
        parts = [range(2), range(2, len(sequences()))] if count > 1 else [range(len(sequences()))]
        sizes = {"multiple_of": shape.multiple_of, "slot_multiple_of": shape.slot_multiple_of}
        batches = [pack(sequences(), part, **sizes) for part in parts]
        engine.forward(batches)
        with device.waits() as waits:
            found = engine.forward(batches)
        engine.backward(batches, lambda place, head: (head.logp().logp_N.sum(), None))
        gradients = {key: each.cpu() for key, each in hf_state(engine.shard.model, engine.full_tensors("grad"))}
        norm = engine.update(1e-3)
        if groups.last_stage and world.rank == world.size - 1:
            logp = torch.cat([each.logp_N.cpu() for each in found])
            held = {"logp": logp, "gradients": gradients, "norm": norm, "waits": dict(waits), "batches": count}
            torch.save(held, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3]))
