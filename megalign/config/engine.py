"""Declare the configuration of `engine`: which engine trains, how it computes, and its own settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from megalign.config.deepspeed_keys import OFFLOADS, ZERO, owned_problem
from megalign.config.megatron_keys import MEGATRON_OWNED
from megalign.schema import Strict, UserError, shorten


class ZeroConfig(Strict):
    """Declares `engine.zero`: ZeRO settings of the DeepSpeed engine."""

    stage: Literal[1, 2, 3] = 2
    """What data ranks share: 1 optimizer state, 2 gradients too, 3 weights too; a higher one saves memory and costs
    communication."""
    offload_optimizer: bool = False
    """Whether the optimizer's state is kept in CPU memory, or on NVMe by `engine.deepspeed_config`; saves GPU memory,
    costs time."""
    offload_params: bool = False
    """Whether weights are kept in CPU memory, or on NVMe by `engine.deepspeed_config`; needs stage 3."""


class EngineConfig(Strict):
    """Declares `engine`: its name, layers, recomputation, the head, and settings passed through to its library."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """Engine that trains: megatron has every parallel axis, deepspeed runs ZeRO on any causal model of transformers."""
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layers that Megatron computes with: TransformerEngine's where it is installed (auto), or only torch's."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping: nothing, attention (selective) or whole layers (full); saves
    memory, costs time."""
    chunk_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens whose logits the head holds at a time; auto keeps a block within 32 MB on a CPU and 300 MB on a GPU."""
    tp_invariant: bool = False
    """Whether the head's gradient is the same to the bit at every tensor-parallel size; costs communication."""
    head_kernel: Literal["auto", "torch", "compiled"] = "auto"
    """How the head computes between its matrix products: by torch's operations, or by functions that torch.compile
    fuses (compiled); auto compiles on a GPU where Triton is installed, unless `run.deterministic`."""
    zero: ZeroConfig = ZeroConfig()
    """ZeRO settings of the DeepSpeed engine."""
    megatron: dict[str, Any] = {}
    """Megatron-Core's own settings of speed and memory, passed through, such as overlap_grad_reduce: true."""
    deepspeed_config: dict[str, Any] = {}
    """DeepSpeed's own settings of speed and memory, passed through, such as zero_optimization: {overlap_comm: true}."""

    @model_validator(mode="after")
    def _one_source(self) -> EngineConfig:
        if self.name == "deepspeed":
            self._check_deepspeed()
            return self
        for key, value in self.megatron.items():
            if key in MEGATRON_OWNED:
                raise UserError(f"engine.megatron.{key} is {shorten(value)}: must be left out; {MEGATRON_OWNED[key]}")
        if self.zero != ZeroConfig():
            raise UserError(f"engine.zero is {self.zero!r}: only engine.name deepspeed reads it; must be left out")
        if self.deepspeed_config:
            shown = shorten(self.deepspeed_config)
            raise UserError(f"engine.deepspeed_config is {shown}: only engine.name deepspeed reads it; must be empty")
        return self

    def _check_deepspeed(self) -> None:
        """Refuse settings of the other engine, and those that contradict each other."""
        if self.megatron:
            shown = shorten(self.megatron)
            raise UserError(f"engine.megatron is {shown}: only engine.name megatron reads it; must be empty")
        if self.layers == "transformer_engine":
            raise UserError(
                "engine.layers is 'transformer_engine': engine.name deepspeed has the layers of transformers; "
                "must be auto or torch, or engine.name megatron"
            )
        if self.zero.offload_params and self.zero.stage < 3:
            raise UserError(
                f"engine.zero.offload_params is true: engine.zero.stage is {self.zero.stage}, which keeps all weights "
                "on every rank; must be false, or the stage 3"
            )
        owned = owned_problem(self.deepspeed_config)
        if owned is not None:
            key, value, instead = owned
            raise UserError(f"engine.deepspeed_config.{key} is {shorten(value)}: must be left out; {instead}")
        section = self.deepspeed_config.get(ZERO)
        if isinstance(section, dict):
            self._check_passed_zero(section)

    def _check_passed_zero(self, section: dict[str, Any]) -> None:
        """Refuse passed-through ZeRO settings that `engine.zero` contradicts."""
        where = f"engine.deepspeed_config.{ZERO}"
        if section.get("overlap_comm") and self.zero.stage == 1:
            raise UserError(
                f"{where}.overlap_comm is {shorten(section['overlap_comm'])}: engine.zero.stage 1 reduces gradients "
                "once a step, after the last backward pass; must be false or left out, or the stage 2 or 3"
            )
        for name, ours in OFFLOADS.items():
            settings = section.get(name)
            if settings is None:
                continue
            if not isinstance(settings, dict):
                raise UserError(
                    f"{where}.{name} is {shorten(settings)}: must be a section such as {{pin_memory: true}}"
                )
            if not getattr(self.zero, ours):
                raise UserError(
                    f"{where}.{name} is {shorten(settings)}: engine.zero.{ours} is false; must be left out, or it true"
                )
            self._check_device(f"{where}.{name}", f"engine.zero.{ours}", settings)

    def _check_device(self, where: str, ours: str, settings: dict[str, Any]) -> None:
        """Refuse devices that `engine.zero` says already, and NVMe where DeepSpeed does not use it."""
        device = settings.get("device", "nvme" if "nvme_path" in settings else None)
        if device is None:
            return
        if device != "nvme":
            raise UserError(f"{where}.device is {shorten(device)}: must be nvme or left out; set it with {ours}")
        if self.zero.stage < 3:
            raise UserError(
                f"{where}.device is 'nvme': engine.zero.stage is {self.zero.stage}; must be left out, or the stage 3"
            )
        for key, value in (("device", settings.get("device")), ("nvme_path", settings.get("nvme_path"))):
            if value is None:
                raise UserError(f"{where}.{key} is missing: NVMe needs device and nvme_path; must be given")
