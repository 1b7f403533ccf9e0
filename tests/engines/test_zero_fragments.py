"""DeepSpeed's state, saved by one partitioning, is bitwise the same in every other, and training goes on bitwise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalign.convert.zero.source import ZeroSource
from megalign.engines.deepspeed.hf_weights import HFWeights
from megalign.runtime.ranks import SharedError
from tests.support.engine_saves import complete
from tests.support.processes import run_ranks

pytest.importorskip("deepspeed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OFFLOADED = {"2o": {"offload_optimizer": {"device": "cpu"}}, "3o": {"offload_optimizer": {"device": "cpu"}}}
OFFLOADED["3p"] = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
VARIANTS = ("1", "2", "3", "2o", "3o", "3p")

EXTRA = {"step": 3, "feed": {"order": [2, 1], "rate": 0.1}, "pair": (1, None)}


class Odd(nn.Module):
    """Parameters of odd sizes and one dimension, one that is frozen, and one of two values for four ranks."""

    def __init__(self, inputs: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 13)
        self.frozen = nn.Linear(13, 13, bias=False)
        self.second = nn.Linear(13, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.pair = nn.Parameter(torch.tensor([0.5, 0.25]))
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.frozen(torch.tanh(self.first(x)))) * self.scale
        return (out.float().square().sum(-1) * self.pair.float().sum()).sum()


@dataclass
class Trained:
    """What checkpoints need of an engine."""

    ds: Any
    weights: HFWeights

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        dtype = next(iter(self.weights.trained)).dtype
        self.ds.backward(self.ds(torch.randn(5, 7, generator=generator).to(dtype)))
        self.ds.step()


def _engine(variant: str, dtype: str, *, inputs: int = 7) -> Trained:
    import deepspeed

    torch.manual_seed(0)
    module = Odd(inputs).to(DTYPES[dtype])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    zero = {"stage": int(variant[0]), "stage3_param_persistence_threshold": 20, **OFFLOADED.get(variant, {})}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    ds, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(groups, lr=0.01, fused=dtype == "fp32"), config=config
    )
    return Trained(ds, HFWeights(module, None, splits={}, tensor=None))


def _join() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def _make(folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()


def _save(engine: Trained, folder: Path) -> None:
    from megalign.engines.deepspeed import checkpoint

    _make(folder)
    complete(checkpoint.begin_save(engine.ds, engine.weights, folder, EXTRA, source=None, copied=False))


def _load(engine: Trained, folder: Path) -> None:
    from megalign.engines.deepspeed import checkpoint

    assert checkpoint.load(engine.ds, engine.weights, folder) == EXTRA


def _weights(engine: Trained) -> dict[str, Tensor]:
    """The module's own weights."""
    import deepspeed

    found = {}
    for parameter, name in engine.weights.trained.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    return found


def _state(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole."""
    source = ZeroSource(folder / "zero")
    state = {
        f"{kind} {name}": source.read(name, kind, 0, torch.Size(spec.shape).numel())
        for name, spec in source.specs.items()
        for kind in source.index.kinds
    }
    return state | {"step": torch.tensor(source.step)}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def two_ranks(folder: Path) -> None:
    _join()
    for dtype in DTYPES:
        for variant in VARIANTS:
            _save_and_resume(folder / dtype / variant, variant, dtype)
        _replaced(folder / dtype / "replaced", dtype)
    _failing(folder / "failing")


def _save_and_resume(here: Path, variant: str, dtype: str) -> None:
    engine = _engine(variant, dtype)
    for number in range(3):
        engine.step(number)
    _save(engine, here / "at3")
    for number in (3, 4):
        engine.step(number)
    _save(engine, here / "at5")
    resumed = _engine(variant, dtype)
    resumed.step(9)  # has state to be replaced, which a fresh one has not
    for again in (resumed, _engine(variant, dtype)):
        _load(again, here / "at3")
        for number in (3, 4):
            again.step(number)
        _save(again, here / ("resumed5" if again is resumed else "fresh5"))


def _replaced(here: Path, dtype: str) -> None:
    """Replace the weights of engines that have taken steps."""
    import deepspeed

    from megalign.engines.deepspeed.fragments import weights_changed

    for variant in ("1", "2", "3", "3o"):
        engine = _engine(variant, dtype)
        engine.step(0)
        for parameter in engine.weights.trained:
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned), torch.no_grad():
                parameter.fill_(0.5)
        weights_changed(engine.ds)
        _save(engine, here / variant)


def _failing(folder: Path) -> None:
    """One rank that cannot write, and a checkpoint of another model: every rank says so."""
    from megalign.engines.deepspeed import checkpoint

    engine = _engine("2", "fp32")
    _make(folder)
    with pytest.raises(SharedError, match="cannot be written: No such file"):
        target = folder if dist.get_rank() == 0 else folder / "nowhere" / "step"
        complete(checkpoint.begin_save(engine.ds, engine.weights, target, EXTRA, source=None, copied=False))
    other = folder / "other"
    _save(_engine("2", "fp32", inputs=5), other)
    with pytest.raises(SharedError, match=r"parameter first.weight has shape \[13, 5\]; must have shape \[13, 7\]"):
        _load(engine, other)


def other_ranks(folder: Path) -> None:
    """Load what two ranks saved."""
    _join()
    for dtype in DTYPES:
        for saved, variant in (("2", "1"), ("2", "3"), ("3p", "2"), ("1", "3o"), ("3", "3")):
            engine, at3 = _engine(variant, dtype), folder / dtype / saved / "at3"
            _load(engine, at3)
            source = ZeroSource(at3 / "zero")
            assert _same(_weights(engine), {name: source.weight(name) for name in source.specs})
            _save(engine, folder / dtype / f"{saved} to {variant} on {dist.get_world_size()}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of 2 ranks, and what 1 and 4 made of them."""
    folder = tmp_path_factory.mktemp("zero")
    for number, function in ((2, two_ranks), (1, other_ranks), (4, other_ranks)):
        run_ranks(function, number, folder, timeout_s=600)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resumed", ["resumed5", "fresh5"])
def test_two_steps_after_a_resume_are_those_without_one(saved, dtype, variant, resumed):
    here = saved / dtype / variant
    assert _state(here / "at5")["step"] == 5
    assert _same(_state(here / "at5"), _state(here / resumed))
    assert not _same(_state(here / "at5"), _state(here / "at3"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_partitioning_holds_the_same_state(saved, dtype, ranks):
    made = sorted((saved / dtype).glob(f"* on {ranks}"))
    assert len(made) == 5
    for path in made:
        assert _same(_state(saved / dtype / path.name.split()[0] / "at3"), _state(path)), path.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["1", "2", "3", "3o"])
def test_replaced_weights_start_the_optimizer_anew(saved, dtype, variant):
    for name, values in _state(saved / dtype / "replaced" / variant).items():
        assert torch.equal(values, torch.full_like(values, 0.5 if name.startswith("weight ") else 0)), name


def test_frozen_parameters_are_not_written(saved):
    names = ZeroSource(saved / "bf16" / "3" / "at3" / "zero").specs
    assert sorted(names) == ["first.bias", "first.weight", "pair", "scale", "second.bias", "second.weight"]
