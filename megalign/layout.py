"""Which cuts of a job over ranks can work for a model, and the nearest ones that do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from megalign.convert.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """The parallel axes of a job; data ranks are what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    def text(self, world_size: int) -> str:
        """The axes that are not 1, as in `tensor 2, data 4, sequence`."""
        data = world_size // (self.tensor * self.pipeline * self.context)
        axes = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual_pipeline,
            "context": self.context,
            "data": data,
            "expert": self.expert,
        }
        parts = [f"{name} {size}" for name, size in axes.items() if size > 1]
        return ", ".join([*parts, *(["sequence"] if self.sequence else [])]) or "all 1"


def problem(layout: Layout, model: ModelConfig, world_size: int, *, trained: bool = True) -> str | None:
    """Why a layout cannot work, in one line that names field, value and what is allowed; None where it can.

    trained: whether it is the model that the job trains; one that is only scored need not have experts.
    """
    steps = (_ranks(layout, world_size), _tensor(layout, model), _pipeline(layout, model))
    return next((found for found in steps if found), None) or _expert(layout, model, world_size, trained=trained)


def _ranks(layout: Layout, world_size: int) -> str | None:
    product = layout.tensor * layout.pipeline * layout.context
    if world_size % product == 0:
        return None
    return (
        f"parallel.tensor x parallel.pipeline x parallel.context is {layout.tensor} x {layout.pipeline} x "
        f"{layout.context} = {product}: must divide the number of ranks {world_size}, so be one of "
        f"{_listed(_divisors(world_size))}"
    )


def _tensor(layout: Layout, model: ModelConfig) -> str | None:
    if layout.sequence and layout.tensor == 1:
        return "parallel.sequence is true: it splits over tensor ranks, so parallel.tensor must be at least 2"
    splits = _tensor_splits(model)
    for what, size in splits.items():
        if size % layout.tensor:
            return (
                f"parallel.tensor is {layout.tensor}: must divide the model's {what} {size}; "
                f"values that fit this model: {_listed(_divisors(math.gcd(*splits.values())))}"
            )
    return None


def _tensor_splits(model: ModelConfig) -> dict[str, int]:
    """What tensor ranks must share evenly."""
    splits = {"attention heads": model.num_heads, "key-value heads": model.num_kv_heads}
    if not all(model.has_experts(layer) for layer in range(model.num_layers)):
        splits["feed-forward size"] = model.ffn_size
    if model.moe is not None and model.moe.shared_ffn_size:
        splits["shared expert's size"] = model.moe.shared_ffn_size
    return splits | {"padded vocabulary": model.padded_vocab_size}


def _pipeline(layout: Layout, model: ModelConfig) -> str | None:
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        return (
            f"parallel.virtual_pipeline is {layout.virtual_pipeline}: it interleaves pipeline stages, "
            "so parallel.pipeline must be at least 2"
        )
    stages = layout.pipeline * layout.virtual_pipeline
    if stages > model.num_layers:
        name = "parallel.pipeline" if layout.virtual_pipeline == 1 else "parallel.pipeline x parallel.virtual_pipeline"
        return f"{name} is {stages}: must be at most the model's layers {model.num_layers}"
    return None


def _expert(layout: Layout, model: ModelConfig, world_size: int, *, trained: bool) -> str | None:
    if model.moe is None:
        if layout.expert > 1 and trained:
            return f"parallel.expert is {layout.expert}: the model has no experts; must be 1"
        return None
    sharers = world_size // layout.pipeline
    allowed = _divisors(math.gcd(model.moe.num_experts, sharers))
    if layout.expert not in allowed:
        return (
            f"parallel.expert is {layout.expert}: must divide the model's experts {model.moe.num_experts} and the "
            f"ranks of a stage {sharers}; values that fit: {_listed(allowed)}"
        )
    if layout.tensor > 1 and not layout.sequence:
        return (
            f"parallel.sequence is false: with experts and parallel.tensor {layout.tensor} it must be true, "
            "so that tensor ranks route different tokens"
        )
    return None


def nearest(layout: Layout, model: ModelConfig, world_size: int, *, count: int = 3) -> list[Layout]:
    """Layouts of this number of ranks that work for the model, those with the fewest doublings from `layout` first."""

    def distance(other: Layout) -> tuple[float, tuple[int, ...]]:
        pairs = zip(astuple(layout)[:5], astuple(other)[:5], strict=True)
        doublings = sum(abs(math.log2(other_size / size)) for size, other_size in pairs)
        return doublings + 0.25 * (layout.sequence != other.sequence), astuple(other)

    return sorted(_working(layout, model, world_size), key=distance)[:count]


def _working(layout: Layout, model: ModelConfig, world_size: int) -> Iterator[Layout]:
    tensors = [size for size in _divisors(math.gcd(*_tensor_splits(model).values())) if world_size % size == 0]
    experts = [1] if model.moe is None else _divisors(model.moe.num_experts)
    virtuals = sorted({1, 2, layout.virtual_pipeline, max(1, layout.virtual_pipeline // 2)})
    for tensor in tensors:
        for pipeline in _divisors(world_size // tensor):
            contexts = _divisors(world_size // (tensor * pipeline))
            for virtual, context, expert in itertools.product(virtuals, contexts, experts):
                for sequence in (False, True):
                    other = Layout(tensor, pipeline, virtual, context, expert, sequence)
                    if problem(other, model, world_size) is None:
                        yield other


def refusal(layout: Layout, model: ModelConfig, world_size: int, *, trained: bool = True) -> str | None:
    """`problem` with the nearest layouts that work behind it."""
    found = problem(layout, model, world_size, trained=trained)
    if found is None:
        return None
    others = "; ".join(other.text(world_size) for other in nearest(layout, model, world_size))
    return f"{found}; nearest layouts of {world_size} ranks for this model: {others}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
