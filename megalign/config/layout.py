"""Check a parallel layout against a model, and find the nearest layouts that work."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass

from megalign.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """Holds the sizes of a job's parallel axes; data is the world size over tensor x pipeline x context."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False

    def text(self, world_size: int) -> str:
        """Return the axes that are not 1 as text, such as `tensor 2, data 4, sequence`."""
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
    """Return an error line with field, value and what it must be if the layout cannot work; else None.

    trained: whether the job trains the model; expert parallelism is ignored for a dense model that is only scored.
    """
    errors = (_ranks(layout, world_size), _tensor(layout, model), _pipeline(layout, model))
    return next((error for error in errors if error), None) or _expert(layout, model, world_size, trained=trained)


def _ranks(layout: Layout, world_size: int) -> str | None:
    product = layout.tensor * layout.pipeline * layout.context
    if world_size % product == 0:
        return None
    return (
        f"parallel.tensor x parallel.pipeline x parallel.context is {layout.tensor} x {layout.pipeline} x "
        f"{layout.context} = {product}: must divide the number of ranks {world_size}, so be one of "
        f"{_listed(divisors(world_size))}"
    )


def _tensor(layout: Layout, model: ModelConfig) -> str | None:
    if layout.sequence and layout.tensor == 1:
        return "parallel.sequence is true: it splits over tensor ranks, so parallel.tensor must be at least 2"
    splits = _tensor_splits(model)
    for what, size in splits.items():
        if size % layout.tensor:
            return (
                f"parallel.tensor is {layout.tensor}: must divide the model's {what} {size}; "
                f"values that fit this model: {_listed(divisors(math.gcd(*splits.values())))}"
            )
    return None


def _tensor_splits(model: ModelConfig) -> dict[str, int]:
    """Return {name: size} of the model's sizes that the tensor axis must divide."""
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
    allowed = divisors(math.gcd(model.moe.num_experts, sharers))
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
    """Return `count` working layouts of `world_size` ranks, by the number of axis doublings from `layout`."""
    return closest(layout, _working(layout, model, world_size), count=count)


def closest(layout: Layout, others: Iterable[Layout], *, count: int = 3) -> list[Layout]:
    """Return the `count` layouts with the fewest axis doublings from `layout`."""

    def distance(other: Layout) -> tuple[float, tuple[int, ...]]:
        pairs = zip(astuple(layout)[:5], astuple(other)[:5], strict=True)
        doublings = sum(abs(math.log2(other_size / size)) for size, other_size in pairs)
        return doublings + 0.25 * (layout.sequence != other.sequence), astuple(other)

    return sorted(others, key=distance)[:count]


def _working(layout: Layout, model: ModelConfig, world_size: int) -> Iterator[Layout]:
    """Yield the layouts of `world_size` ranks that work for the model."""
    tensors = [size for size in divisors(math.gcd(*_tensor_splits(model).values())) if world_size % size == 0]
    experts = [1] if model.moe is None else divisors(model.moe.num_experts)
    virtuals = sorted({1, 2, layout.virtual_pipeline, max(1, layout.virtual_pipeline // 2)})
    splits = (
        (tensor, pipeline, context)
        for tensor in tensors
        for pipeline in divisors(world_size // tensor)
        for context in divisors(world_size // (tensor * pipeline))
    )
    for sizes, virtual, expert, sequence in itertools.product(splits, virtuals, experts, (False, True)):
        tensor, pipeline, context = sizes
        other = Layout(tensor, pipeline, virtual, context, expert, sequence)
        if problem(other, model, world_size) is None:
            yield other


def refusal(layout: Layout, model: ModelConfig, world_size: int, *, trained: bool = True) -> str | None:
    """Return the error line of `problem`, followed by the nearest layouts that work; None if the layout works."""
    message = problem(layout, model, world_size, trained=trained)
    if message is None:
        return None
    return with_nearest(message, layout, _working(layout, model, world_size), world_size)


def with_nearest(message: str, layout: Layout, working: Iterable[Layout], world_size: int) -> str:
    """Return an error line followed by the nearest of the layouts that work."""
    others = "; ".join(other.text(world_size) for other in closest(layout, working))
    return f"{message}; nearest layouts of {world_size} ranks for this model: {others}"


def split_layers(num_layers: int, stages: int) -> list[int]:
    """Return each stage's number of layers, as even as possible; the last (with the head) and the first get fewer."""
    even, left = divmod(num_layers, stages)
    takers = [*range(1, stages - 1), 0][:left]
    return [even + (stage in takers) for stage in range(stages)]


def layers_by_stage(counts: Sequence[int], pipeline: int) -> list[list[list[int]]]:
    """Return the numbers of the layers in each chunk of each pipeline rank; counts: of each stage, in order."""
    ends = list(itertools.accumulate(counts))
    chunks = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
    return [chunks[rank::pipeline] for rank in range(pipeline)]


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
