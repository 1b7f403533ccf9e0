"""What a gradient norm is made of: every element of every family's parameters once, however they are cut."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.convert.rules import lora_targets
from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import MicroBatch, pack
from megalign.engines.megatron.engine import AdamW, MegatronEngine
from megalign.engines.megatron.groups import make_groups
from megalign.engines.megatron.shard import EngineOptions
from megalign.model_config import Lora
from megalign.runtime.distributed import process_group
from tests.support.families import EXPERT_FAMILIES, FAMILY_CASES, PLAIN_CASES, write_family
from tests.support.lora_answers import draw_adapters
from tests.support.processes import run_ranks

CASES = {**PLAIN_CASES, **FAMILY_CASES}
ROUTED = {case for case, (model_type, _) in CASES.items() if model_type in EXPERT_FAMILIES}
# Layouts of four ranks; experts beside tensor ranks need it.
CUTS = {
    "tp2 pp2": Layout(tensor=2, pipeline=2),
    "tp2 pp2 sp": Layout(tensor=2, pipeline=2, sequence=True),
    "tp2 pp2 sp ep2": Layout(tensor=2, pipeline=2, expert=2, sequence=True),
    "tp2 dp2 sp ep2": Layout(tensor=2, expert=2, sequence=True),
}
ONE = "one rank"
STEPPED = ("gpt-oss", "gpt-oss-tied", "llama", "qwen2-moe")  # cases that take optimizer steps too
# Cases of the default suite, one of each kind of parameters; `slow` has all.
FEW = (*STEPPED, "llama-tied", "gemma3", "glm4", "qwen3", "mixtral", "deepseek-v2-lite", "deepseek-v3-bias")
LR, CLIP, STEPS = 1e-3, 0.5, 3


def takes(case: str, cut: str, *, lora: bool) -> bool:
    """Whether a case runs on a layout: adapters on the one that cuts most."""
    if cut == ONE:
        return True
    if lora:
        return cut == ("tp2 pp2 sp ep2" if case in ROUTED else "tp2 pp2 sp")
    return (cut != "tp2 pp2") if case in ROUTED else "ep2" not in cut


def packed(engine: MegatronEngine) -> MicroBatch:
    """Two sequences in a row, the same on every data rank; no token has two experts that are equally good."""
    random = torch.Generator().manual_seed(14)
    tokens = [torch.randint(131, (length,), generator=random).tolist() for length in (17, 6)]
    sequences = [TokenSequence(0, 0, "response", tuple(ids[:1]), Response(tuple(ids[1:]))) for ids in tokens]
    shape = engine.shape
    return pack(sequences, range(2), multiple_of=shape.multiple_of, slot_multiple_of=shape.slot_multiple_of)


def backward(engine: MegatronEngine) -> float:
    """The mean negative log-prob on every rank, its gradient left in the engine."""
    seen = []

    def objective(place: int, head: Any) -> tuple[torch.Tensor, None]:
        loss = -head.logp().logp_N.mean()
        seen.append(float(loss.detach()))
        return loss / engine.shard.groups.data_size, None

    engine.backward([packed(engine)], objective)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    return max(loss for losses in everyone for loss in losses)


def trained(engine: MegatronEngine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters that have a gradient, by names that no layout changes."""
    yield from ((name, one) for name, one in engine.shard.named_parameters().items() if one.requires_grad)
    for chunk in engine.shard.chunks:
        for adapter in () if chunk.adapters is None else chunk.adapters.by_weight.values():
            yield from ((name, parameter) for name, parameter, _ in adapter.parts())


def counted(engine: MegatronEngine) -> dict[str, int]:
    """{name: elements that the norm takes from it, over all ranks}, by the addresses of the optimizers' gradients."""
    engine.optimizer.prepare_grads()
    starts = sorted((parameter.main_grad.data_ptr(), name) for name, parameter in trained(engine))
    mine: Counter[str] = Counter()
    for part in engine.optimizer.chained_optimizers:
        for grad in part.get_main_grads_for_grad_norm():
            _, name = starts[bisect.bisect_right(starts, (grad.data_ptr(), "~")) - 1]
            mine[name] += grad.numel()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return dict(sum(everyone, Counter()))


def measure(source: Path, groups: Any, options: EngineOptions, *, steps: int) -> dict[str, Any]:
    """One engine's counted elements, the norm of its first gradient, and losses and norms of clipped steps."""
    engine = MegatronEngine(read_model_config(source), groups, options, adamw=AdamW(eps=1e-5, clip_norm=CLIP))
    engine.load_weights(source)
    if options.lora is not None:
        draw_adapters(engine)
    losses = [backward(engine)]
    kind = engine.full_tensors if options.lora is None else engine.adapter_tensors
    # What is tied is named twice on several stages, and its gradient is whole in both places.
    tied = engine.shard.model.tied
    whole = {name: float(grad.norm()) for name, grad in kind("grad") if not tied or "output" not in name}
    found = {"counted": counted(engine), "norm": float(torch.tensor(list(whole.values())).norm())}
    norms = [engine.update(LR)]
    for _ in range(steps - 1):
        losses.append(backward(engine))
        norms.append(engine.update(LR))
    return {**found, "losses": losses, "norms": norms, "sizes": {name: one.numel() for name, one in trained(engine)}}


def run(folder: Path, cuts: dict[str, Layout], cases: Sequence[str]) -> None:
    """Each case on each of the layouts; rank 0 leaves what it found in a file a layout."""
    with process_group(timeout_s=120) as world:
        for cut, layout in cuts.items():
            groups, found = make_groups(layout, timeout_s=60), {}
            for case, lora in ((case, lora) for case in cases for lora in (False, True)):
                if not takes(case, cut, lora=lora):
                    continue
                source = folder / case
                options = EngineOptions(torch.float32, world.device)
                if lora:
                    targets = tuple(lora_targets(read_model_config(source)))
                    options = replace(options, lora=Lora(2, 1.0, targets))
                steps = STEPS if case in STEPPED else 1
                found[f"{case} lora" if lora else case] = measure(source, groups, options, steps=steps)
            if world.is_main:
                torch.save(found, folder / f"{cut}.pt")


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("counted")
    cases = FEW if request.param == "few" else tuple(CASES)
    for case in cases:
        fields = CASES[case][1]
        kinds = {"layer_types": fields["layer_types"][:2]} if "layer_types" in fields else {}
        write_family(folder / case, case, num_hidden_layers=2, **kinds)
    run(folder, {ONE: Layout()}, cases)
    run_ranks(run, 4, folder, CUTS, cases)
    return {cut: torch.load(folder / f"{cut}.pt") for cut in (ONE, *CUTS)}


def test_one_rank_counts_every_parameter_once(found: dict[str, dict[str, Any]]) -> None:
    assert len(found[ONE]) in (2 * len(FEW), 2 * len(CASES))
    for case, one in found[ONE].items():
        assert one["counted"] == one["sizes"], case
        assert one["norms"][0] == pytest.approx(one["norm"], rel=1e-6), case


@pytest.mark.parametrize("cut", CUTS)
def test_ranks_together_count_the_same_elements(found: dict[str, dict[str, Any]], cut: str) -> None:
    assert found[cut]
    for case, several in found[cut].items():
        right = found[ONE][case]["counted"]
        wrong = {name: (several["counted"].get(name), right.get(name)) for name in {*right, *several["counted"]}}
        assert {name: pair for name, pair in wrong.items() if pair[0] != pair[1]} == {}, case


@pytest.mark.parametrize("cut", CUTS)
def test_the_norm_is_that_of_one_rank(found: dict[str, dict[str, Any]], cut: str) -> None:
    for case, several in found[cut].items():
        assert several["norms"][0] == pytest.approx(several["norm"], rel=2e-6), case
        assert several["norms"][0] == pytest.approx(found[ONE][case]["norm"], rel=1e-5), case


@pytest.mark.parametrize("cut", CUTS)
def test_clipped_steps_are_those_of_one_rank(found: dict[str, dict[str, Any]], cut: str) -> None:
    stepped = {case: one for case, one in found[cut].items() if len(one["losses"]) > 1}
    assert stepped
    for case, several in stepped.items():
        right = found[ONE][case]
        assert right["norms"][0] > 2 * CLIP and right["losses"][-1] < right["losses"][0] - 1e-3, case
        assert several["losses"] == pytest.approx(right["losses"], rel=1e-5), case
        assert several["norms"] == pytest.approx(right["norms"], rel=1e-4), case
