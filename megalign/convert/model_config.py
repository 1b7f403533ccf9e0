"""A decoder described without Hugging Face's names or Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's: low frequencies are divided, high ones kept, those between blended (Llama 3.1 report)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a ramp between kept and divided frequencies, and sharper attention."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ramp's ends to whole dimensions
    attention_factor: float = 1.0  # sines and cosines are multiplied by it


@dataclass(frozen=True, slots=True)
class LongScaling:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, others in sequences that outgrow the first training."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the first `dim` dimensions of queries and keys turn."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    interleaved: bool = False  # neighbours turn together, else dimension i and i + dim / 2


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The experts that take the MLP's place: a router picks `top_k` of them for each token, none is dropped."""

    num_experts: int
    top_k: int
    ffn_size: int  # of one expert
    normalize: bool = True  # the chosen experts' scores are scaled to sum to one
    shared_ffn_size: int = 0  # of the expert that every token passes; 0: there is none
    shared_gate: bool = False  # a sigmoid of its own scales the shared expert's output
    dense_layers: tuple[int, ...] = ()  # layers that keep an ordinary MLP
    score: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False  # added to scores for the choice alone; no gradient reaches it
    groups: int = 1  # experts lie in equal groups, and a token's may come from `top_groups` of them only
    top_groups: int = 1
    group_best: int = 1  # a group counts as much as this many of its best experts together
    scale: float = 1.0  # of the routed experts' output
    bias: bool = False  # on router and experts


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a low-rank vector."""

    query_rank: int | None  # None: queries come straight from the hidden state
    rank: int  # of keys and values
    nope_dim: int  # of a head's query and key without rotary positions, beside `Rope.dim` with them
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that fix a decoder of gated MLPs, RMSNorms, rotary positions and grouped queries."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    sliding_rope: Rope | None = None  # of layers with a window, where it is another
    rope_fp32: bool = False  # in half precision queries and keys are rounded only when they have turned
    no_rope_layers: tuple[int, ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None  # over a head's dimensions, or all heads' together
    pre_norm: bool = True  # before attention and MLP
    post_norm: bool = False  # on what they add to the residual stream
    norm_offset: float = 0.0  # norms multiply by it plus their weight
    norm_fp32: bool = False  # weights are multiplied before the product is rounded to the model's dtype
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    attention_scale: float | None = None  # of queries times keys; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # those products are bounded smoothly by it
    sinks: bool = False  # a learned number for each head stands in the softmax beside the positions
    logit_scale: float = 1.0  # the head's products are multiplied by it
    logit_softcap: float | None = None  # then bounded smoothly by it
    moe: MoeConfig | None = None
    latent: LatentConfig | None = None
    sliding_window: int | None = None  # a token sees itself and the `sliding_window - 1` before it
    full_layers: tuple[int, ...] = ()  # layers that see everything nevertheless

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) routes tokens to experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def window(self, layer: int) -> int | None:
        """How many positions a layer's tokens see, themselves included; None: all before them."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary positions of the layers."""
        return (self.rope,) if self.sliding_rope is None else (self.rope, self.sliding_rope)

    def rope_of(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; None: it has no positions."""
        if layer in self.no_rope_layers:
            return None
        return int(self.sliding_rope is not None and self.window(layer) is not None)

    @property
    def key_dim(self) -> int:
        """Of a head's queries and keys."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.rope.dim

    @property
    def value_dim(self) -> int:
        """Of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def is_plain(self) -> bool:
        """Whether every layer is as in Llama, Qwen3 or Mixtral: nothing but what all libraries' layers compute."""
        extra = (
            self.sliding_rope,
            self.rope_fp32,
            self.no_rope_layers,
            self.full_layers,
            self.post_norm,
            not self.pre_norm,
            self.norm_offset,
            self.norm_fp32,
            self.activation != "silu",
            self.residual_scale != 1.0,
            self.attention_scale,
            self.attention_softcap,
            self.sinks,
            self.latent,
            self.qk_norm == "all",
            self.rope.dim != self.head_dim,
            self.rope.interleaved,
            isinstance(self.rope.scaling, YarnScaling | LongScaling),
            self.moe is not None and (self.moe.score != "softmax" or self.moe.groups > 1 or self.moe.bias),
        )
        return not any(extra)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head as Megatron holds them: a multiple of 128, whatever the layout.

        Independence of the tensor-parallel size keeps checkpoints and numbers free of it; 128 admits every power of two
        up to 128, and so the equal tiles of `ops.vocab.tile_rows`.
        """
        return -(-self.vocab_size // 128) * 128

    @property
    def attention_cost(self) -> float:
        """Cost of a pair of positions of causal attention, relative to all else that a position costs in the layers.

        Counts multiplications of matrices (PaLM, arXiv 2204.02311, appendix B), half of the pairs being masked; latent
        attention counts as if its projections were whole.
        """
        heads = self.num_heads * (self.key_dim + self.value_dim)
        attention = self.hidden_size * (heads + self.num_kv_heads * (self.key_dim + self.value_dim))
        moe = self.moe
        dense = sum(not self.has_experts(layer) for layer in range(self.num_layers)) * self.ffn_size
        routed = 0 if moe is None else moe.top_k * moe.ffn_size + moe.shared_ffn_size
        experts = sum(self.has_experts(layer) for layer in range(self.num_layers)) * routed
        per_token = attention * self.num_layers + 3 * self.hidden_size * (dense + experts)
        return self.num_layers * heads / 2 / per_token
