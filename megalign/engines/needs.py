"""Declares an engine's estimate of the memory of a rank, and counts what both engines keep of a layer for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megalign.config.job import JobConfig
from megalign.model_config import ModelConfig, ModelFacts

FP32 = 4  # bytes
MOMENTS = 2 * FP32  # AdamW's two averages of a weight's gradient
FFN_PER_HIDDEN = 4  # of models of which only the common sizes are known


@dataclass(frozen=True, slots=True)
class RankNeeds:
    """Estimates the bytes that a rank holds at the peak of a step.

    Exact from the shapes are weights, gradients and optimizer; `activations` is what backward needs of the layers.
    """

    ranks: str  # which ranks: "every rank", or "pipeline stage 2"
    num_parameters: int  # on the rank, adapters included
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int  # a block of logits and its gradient
    beside: int = 0  # other models that stay in memory: a reference, the sampler's copy
    offloaded: int = 0  # in CPU memory, on a device's host
    saving: int = 0  # in CPU memory, while a checkpoint is written

    @property
    def certain(self) -> int:
        """Return what is held at all times."""
        return self.weights + self.gradients + self.optimizer + self.beside

    @property
    def peak(self) -> int:
        """Return the whole estimate."""
        return self.certain + self.activations + self.head


def other_models(cfg: JobConfig, *, whole: Callable[[], int], own: int) -> int:
    """Return the bytes of models that stay in memory beside the policy: only in rounds there are any.

    whole: bytes of all weights, of which the sampler has a copy. own: of the rank's part, which a fixed reference has.
    """
    if cfg.rollout is None:
        return 0
    source = cfg.reference.source
    fixed = cfg.loss.traits().reference and source != "round_start" and not (cfg.lora and source == "initial")
    return whole() + (own if fixed else 0)


def layer_values(model: ModelConfig, layer: int, *, tensor: int = 1, sequence: bool = False) -> float:
    """Return how many values of a token position a layer keeps for backward on one of its tensor ranks.

    Both norms' inputs and outputs, the attention's queries, keys, values and output, and of an MLP gate, up, the
    activated gate and their product (Korthikanti et al., arXiv 2205.05198, with attention that keeps no scores).
    """
    shared = tensor if sequence else 1  # ranks among which positions outside the matrices are split
    heads = (model.num_heads + model.num_kv_heads) * (model.key_dim + model.value_dim) / tensor
    values = 4 * model.hidden_size / shared + heads
    if model.post_norm:
        values += 2 * model.hidden_size / shared
    if not model.has_experts(layer) or model.moe is None:
        return values + 4 * model.ffn_size / tensor
    moe = model.moe
    routed = moe.top_k * (4 * moe.ffn_size + 2 * model.hidden_size)  # the tokens are copied to their experts
    return values + routed / shared + 4 * moe.shared_ffn_size / tensor


def common_layer_values(facts: ModelFacts, *, tensor: int = 1) -> float:
    """Return `layer_values` of a model of which only the common sizes are known."""
    kept_by_attention = 2 * (1 + facts.num_kv_heads / facts.num_heads)
    return facts.hidden_size * (4 + (kept_by_attention + 4 * FFN_PER_HIDDEN) / tensor)
