"""Every family's logits and gradients, at one rank and cut in several ways, against transformers in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalign.config.layout import Layout
from megalign.convert import hf_state, read_model_config
from megalign.convert.hf.model import read_model
from megalign.convert.rules import lora_targets
from megalign.data.micro_batch import MicroBatch, pack
from megalign.engines.export import export
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.model_config import Lora
from megalign.runtime.distributed import process_group
from tests.support.families import EXPERT_FAMILIES, FAMILY_CASES, PLAIN_CASES, write_family
from tests.support.family_answers import answer, sequences
from tests.support.lora_answers import draw_adapters
from tests.support.processes import run_ranks

# 16 positions are what scaled kinds of RoPE call their first training; a window has 3 to 7.
CASES = {**PLAIN_CASES, **FAMILY_CASES}
LAYOUTS = {
    "one": {"tensor": 1, "pipeline": 1},
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2xcp2": {"tensor": 2, "pipeline": 1, "context": 2},
}


def is_routed(case: str) -> bool:
    return CASES[case][0] in EXPERT_FAMILIES


def check(folder: str, layout: str) -> None:
    """Run by every rank of a layout for all cases; raises where anything differs."""
    with process_group(timeout_s=120) as world:
        groups = None
        for case in sorted(CASES, key=is_routed):
            routed = is_routed(case)
            axes = LAYOUTS[layout] | ({"expert": 2} if routed and layout != "one" else {})
            parallel = Layout(**axes, sequence=axes["tensor"] > 1 and (routed or layout == "tp2xcp2"))
            if groups is None or groups.layout != parallel:
                groups = make_groups(parallel, timeout_s=60)
            source = Path(folder) / case
            model = read_model_config(source)
            options = EngineOptions(torch.float32, world.device)
            engine = MegatronEngine(model, groups, options, adamw=AdamW())
            engine.load_weights(source)
            compare(engine, *torch.load(source / "answer.pt"), case=f"{case} {layout}")
            if layout == "tp2xpp2" and case in FAMILY_CASES:
                lora = Lora(2, 1.0, tuple(lora_targets(model)))
                engine = MegatronEngine(model, groups, replace(options, lora=lora), adamw=AdamW())
                engine.load_weights(source)
                merge(engine, source, Path(folder) / f"{case}-merged", case=case)


def merge(engine: MegatronEngine, source: Path, merged: Path, *, case: str) -> None:
    """Check that log-probs with an adapter on every possible layer are transformers' with the merged export."""
    draw_adapters(engine)
    export(engine, read_model(source), merged, lora=engine.shard.options.lora)
    (found,) = engine.forward([packed(engine)]) or (None,)
    if found is not None:
        logits = answer(merged, torch.float32, gradients=False)["logits"]
        right_N = torch.cat([one[:-1].log_softmax(-1) for one in logits])
        right_N = right_N.gather(1, packed(engine).target_N[:, None]).squeeze(1)
        torch.testing.assert_close(found.logp_N, right_N, rtol=1e-4, atol=1e-4)
        before, _ = torch.load(source / "answer.pt")
        assert max(float((a - b).abs().max()) for a, b in zip(before, logits, strict=True)) > 0.1, case


def packed(engine: MegatronEngine) -> MicroBatch:
    shape = engine.shape
    return pack(
        sequences(), range(len(sequences())), multiple_of=shape.multiple_of, slot_multiple_of=shape.slot_multiple_of
    )


def compare(
    engine: MegatronEngine, logits: list[torch.Tensor], gradients: dict[str, torch.Tensor], *, case: str
) -> None:
    batch, seen = packed(engine), []

    def objective(place, head):
        logp_N = head.logp().logp_N
        seen.append((head, logp_N.detach()))
        return logp_N.sum(), None

    engine.backward([batch], objective)
    found = dict(hf_state(engine.shard.model, engine.full_tensors("grad")))
    total = float(torch.stack([right.norm() for right in gradients.values()]).norm())
    for name, right in gradients.items():
        if name in found:  # what is tied has one name
            scale = max(float(right.norm()), 1e-3 * total)  # a bias of keys has almost none
            assert float((found[name] - right).norm()) < 2e-4 * scale, (case, name, float(right.norm()))
    assert len(found) >= len([name for name in gradients if "expert_bias" not in name]) - 1
    if not seen:
        return
    (head, logp_N), group = seen[0], engine.shard.groups.tensor
    right_N = torch.cat([one[:-1].log_softmax(-1) for one in logits])[torch.arange(len(batch.target_N)), batch.target_N]
    torch.testing.assert_close(logp_N, right_N, rtol=1e-5, atol=1e-5 * max(float(one.abs().max()) for one in logits))
    if engine.shard.groups.context_size == 1:
        hidden, weight = gathered(head.hidden_LH.detach(), group), gathered(head.weight_VH.detach(), group)
        hidden = hidden if head.tokens is not None else head.hidden_LH.detach()
        mine = engine.shard.model.logit_scale * (hidden @ weight[:131].T)
        cap = engine.shard.model.logit_softcap
        mine = mine if cap is None else cap * torch.tanh(mine / cap)
        right = torch.cat([one[:-1] for one in logits])
        assert float((mine - right).abs().max()) < 1e-5 * float(right.abs().max()), case
        assert float(right.std()) > 0.5, case


def gathered(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts: list[torch.Tensor] = [mine] * group.size()
    dist.all_gather_object(parts, mine, group=group)
    return torch.cat(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for case in CASES:
        source = write_family(folder / case, case)
        found = answer(source, torch.float32, gradients=True)
        torch.save((found["logits"], found["gradients"]), source / "answer.pt")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_are_those_of_transformers(folder: Path, layout: str) -> None:
    axes = LAYOUTS[layout]
    run_ranks(check, axes["tensor"] * axes["pipeline"] * axes.get("context", 1), str(folder), layout)
