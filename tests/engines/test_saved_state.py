"""What a layout saves is, value for value, what any other layout loads and saves again, and what Megatron saves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalign.config.layout import Layout
from megalign.convert import read_model_config
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.engines.megatron.parts import rectangles
from megalign.model_config import Lora
from megalign.runtime.distributed import World
from tests.support.families import write_family
from tests.support.processes import run_ranks

LORA = Lora(2, 4.0, ("q_proj", "down_proj"))
# (case of `families`, dtype, what differs, adapters)
MODELS = {
    "tied": ("llama-tied", "float32", {}, None),
    # the first two layers, a stage of two, have no experts
    "dense first": ("deepseek-v3", "float32", {"first_k_dense_replace": 2}, None),
    "dense last": ("qwen2-moe", "bfloat16", {"mlp_only_layers": [2, 3]}, None),
    "adapters": ("mixtral", "float32", {}, LORA),
}
SPLIT = Layout(tensor=2, pipeline=2, sequence=True)
DENSE = [Layout(), SPLIT, Layout(pipeline=2, virtual_pipeline=2), Layout(tensor=2, context=2)]
EXPERTS = [
    Layout(),
    Layout(tensor=2, pipeline=2, sequence=True, expert=2),
    Layout(pipeline=2, expert=2),
    Layout(tensor=2, expert=4, sequence=True),
    Layout(pipeline=2, virtual_pipeline=2),
]


@pytest.mark.parametrize("sizes", [(), (7,), (3, 4), (2, 3, 4), (1, 5, 2), (4, 1, 3)])
def test_a_run_of_values_is_rectangles(sizes):
    """Each range of a row-major array, against the positions themselves: in order, each once, few."""
    whole = torch.arange(math.prod(sizes)).view(sizes)
    for start in range(whole.numel() + 1):
        for end in range(start, whole.numel() + 1):
            found = list(rectangles(sizes, start, end))
            inside = [
                whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].reshape(-1)
                for offset, size in found
            ]
            assert torch.cat([torch.arange(0), *inside]).tolist() == list(range(start, end))
            assert len(found) <= max(1, 2 * len(sizes) - 1)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    return {key: reader.read(key).clone() for key in reader.specs}


def steps_of(folder: Path) -> set[float]:
    common = TorchDistReader(folder).common()["optimizer"]
    parts = [common] if "optimizer" in common else common.values()
    return {group["step"] for part in parts for group in part["optimizer"]["param_groups"]}


def go_round_all(folder: Path) -> None:
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=60) as world:
        for name in MODELS:
            go_round(folder / name, name, world)


def go_round(folder: Path, name: str, world: World) -> None:
    """Take two updates, then pass the state from layout to layout, each of which saves it again, and so does Megatron.

    Each layout also takes an update on what it loaded, to tell a state that only looks right.
    """
    from megalign.data.group import Response, TokenSequence
    from megalign.data.micro_batch import pack
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import Groups, make_groups
    from megalign.engines.megatron.shard import EngineOptions
    from tests.support.engine_saves import complete
    from tests.support.megatron_saves import megatron_load, megatron_save

    case, dtype, _, lora = MODELS[name]
    source = folder / "model"
    model = read_model_config(source)
    sequences = [
        TokenSequence(0, 0, "response", (1, 2 + number, 3, 4), Response((5, 6, 7 + number, 8))) for number in range(4)
    ]

    def update(engine: MegatronEngine) -> float:
        batches = [pack(sequences, [number]) for number in range(4)]
        engine.backward(batches, lambda index, head: (head.logp()[0].sum(), None))
        return engine.update(1e-2)

    def fresh(groups: Groups) -> MegatronEngine:
        options = EngineOptions(dtype=getattr(torch, dtype), device=world.device, lora=lora)
        engine = MegatronEngine(model, groups, options, adamw=AdamW(weight_decay=0.1, clip_norm=1.0))
        engine.load_weights(source)
        return engine

    def itself(engine: MegatronEngine, target: Path, extra: dict[str, str]) -> None:
        complete(engine.begin_save(target, extra, copied=False))

    def saved(engine: MegatronEngine, target: str, save=itself) -> Path:
        if world.is_main:
            (folder / target).mkdir()
        dist.barrier()
        save(engine, folder / target, {"from": target})
        dist.barrier()
        return folder / target

    norms, before = [], None
    for number, layout in enumerate(EXPERTS if model.moe is not None else DENSE):
        engine = other = None
        groups = make_groups(layout, timeout_s=60)
        engine = fresh(groups)
        if before is None:
            saved(engine, "untrained")
            engine.load(folder / "untrained")
            for _ in range(2):
                update(engine)
        else:
            assert engine.load(before) == {"from": before.name}
        before = saved(engine, f"{number}")
        kinds = number == (3 if "dense" in name else 1)  # Megatron saves no stage without experts
        if kinds:
            saved(engine, f"{number} Megatron", megatron_save)
            engine = fresh(groups)
            megatron_load(engine, before)
            saved(engine, f"{number} through Megatron")
            engine = fresh(groups)
            engine.load(folder / f"{number} Megatron")
            saved(engine, f"{number} from Megatron")
        norms.append(update(engine) / groups.data_size)  # every data rank has the whole batch
        if kinds:
            other = fresh(groups)
            other.load(before)
            update(other)
            same = zip(engine.full_tensors(), other.full_tensors(), strict=True)
            for (key, mine), (_, right) in same:
                assert torch.equal(mine, right), (key, layout)
    if world.is_main:
        torch.save(norms, folder / "norms.pt")


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, (case, dtype, changes, _) in MODELS.items():
        write_family(folder / name / "model", case, dtype=getattr(torch, dtype), **changes)
    run_ranks(go_round_all, 4, folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_layouts_exchange_their_state(name, rounds):
    folder, dtype = rounds / name, MODELS[name][1]
    wanted = contents(folder / "0")
    assert any(key.startswith("optimizer.state.exp_avg.") and value.any() for key, value in wanted.items())
    for saved in sorted(path for path in folder.iterdir() if path.name[0].isdecimal()):
        found = contents(saved)
        assert found.keys() == wanted.keys(), saved.name
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), saved.name
        assert steps_of(saved) == {2.0}, saved.name
    sizes = [path.stat().st_size for path in (folder / "0").glob("*.distcp")]  # on four data ranks
    assert len(sizes) == 4 and max(sizes) < 1.2 * min(sizes)
    untrained = contents(folder / "untrained")
    assert untrained.keys() == wanted.keys()
    assert not any(value.any() for key, value in untrained.items() if ".exp_avg" in key)
    norms = torch.load(folder / "norms.pt")
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5 if dtype == "float32" else 0.05)
