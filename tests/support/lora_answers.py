"""Float64 answers for adapters: `peft` on the dense models, weights merged by hand where experts are stacked."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalign.engines.megatron.engine import MegatronEngine
from tests.support.loss_cases import LOSSES
from tests.support.oracle import SlowAdamW, load_float64, scored_rows, token_scores
from tests.support.parity_answers import Answers
from tests.support.parity_cases import ADAM_STEPS, ADAPTER_LR, ADAPTERS, CLIP, DECAY, EPS, step_sequences
from tests.support.parity_layouts import EXPERTS

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
STACKED = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")


def drawn(name: str, shape: torch.Size) -> Tensor:
    """The value that tests give an adapter's matrix, from its name alone; far from what training would reach."""
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def draw_adapters(engine: MegatronEngine) -> None:
    """Set an engine's adapters to the values of `drawn`, on each rank its part."""
    shapes = {name: tensor.shape for name, tensor in engine.adapter_tensors()}
    adapters = [chunk.adapters for chunk in engine.shard.chunks if chunk.adapters is not None]
    parts = [part for one in adapters for adapter in one.by_weight.values() for part in adapter.parts()]
    for name, parameter, shard_dim in parts:
        value = drawn(name, shapes[name])
        if shard_dim is not None:
            value = value.chunk(engine.shard.groups.tensor_size, dim=shard_dim)[engine.shard.groups.tensor_rank]
        parameter.data.copy_(value)
    engine.optimizer.reload_model_params()


def with_peft(path: Path, values: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A policy with `peft`'s own adapters, and these by our names."""
    import peft

    modules = sorted({name.removesuffix(LORA_A) for name in values if name.endswith(LORA_A)})
    settings = peft.LoraConfig(r=ADAPTERS.rank, lora_alpha=ADAPTERS.alpha, target_modules=modules)
    model = peft.get_peft_model(load_float64(path), settings).double()
    found = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(values[name])
    assert found.keys() == values.keys()
    return model, found


class Merged:
    """A policy whose weights are computed from adapters at every call."""

    def __init__(self, path: Path, values: dict[str, Tensor]) -> None:
        self.base = load_float64(path)
        self.config = self.base.config
        self.values = {name: value.double().requires_grad_() for name, value in values.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.base, self.weights(), args, kwargs)

    def weights(self) -> dict[str, Tensor]:
        """Hugging Face weights with the adapters merged."""
        weights = {name: weight.detach() for name, weight in self.base.named_parameters()}
        for name in self.values:
            if not name.endswith(LORA_A):
                continue
            module = name.removesuffix(LORA_A)
            delta = ADAPTERS.alpha / ADAPTERS.rank * self.values[module + LORA_B] @ self.values[name]
            module = module.replace(".block_sparse_moe.", ".mlp.")
            match = STACKED.fullmatch(module)
            if match is None:
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + delta
                continue
            home = f"{match[1]}.{'down_proj' if match[3] in ('down_proj', 'w2') else 'gate_up_proj'}"
            whole = torch.zeros_like(weights[home][0])
            size = len(delta)
            first = size if match[3] in ("up_proj", "w3") else 0  # gate rows come first
            whole = torch.cat((whole[:first], delta, whole[first + size :]))
            number = torch.arange(len(weights[home])) == int(match[2])
            weights[home] = weights[home] + number[:, None, None] * whole
        return weights


def lora_answer(answers: Answers, name: str, shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """Three AdamW steps of a GVPO loss from drawn adapters: first gradients, then losses, norms and adapters."""
    values = {key: drawn(key, shape) for key, shape in shapes.items()}
    path = answers.folder / name / "policy"
    model: Callable[..., Any]
    parameters: dict[str, Tensor]
    if name in EXPERTS:
        merged = Merged(path, values)
        model, parameters = merged, merged.values
    else:
        model, parameters = with_peft(path, values)
    adamw, steps, gradients = SlowAdamW(parameters, eps=EPS, weight_decay=DECAY), [], {}
    for number in range(ADAM_STEPS):
        policy = [token_scores(scored_rows(model, sequence))[0] for sequence in step_sequences(LOSSES["gvpo"][1])]
        value = answers.loss(name, "gvpo", policy, model)
        gradient = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
        gradients = gradients or {key: one.clone() for key, one in gradient.items()}
        steps.append((float(value.detach()), adamw.step(gradient, lr=ADAPTER_LR, clip_norm=CLIP)))
        assert number or steps[0][1] > 0
    return {
        "gradients": gradients,
        "steps": steps,
        "adapters": {key: parameter.detach() for key, parameter in parameters.items()},
    }
