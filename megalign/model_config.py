"""Describes a decoder-only model independently of Hugging Face's and Megatron's configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Divides positions by a factor (linear position interpolation)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Divides low rotary frequencies, keeps high ones, and blends those between (Llama 3.1 report)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolates between kept and divided rotary frequencies, and scales attention (YaRN, arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole dimensions
    attention_factor: float = 1.0  # multiplies sines and cosines


@dataclass(frozen=True, slots=True)
class LongScaling:
    """Divides each rotary frequency by its own factor (LongRoPE, arXiv 2402.13753).

    short, long: the factors for sequences up to `original_max_positions` tokens, and for longer ones.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Describes a rotary embedding, which rotates the first `dim` dimensions of each query and key head."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    interleaved: bool = False  # rotate pairs (2i, 2i + 1), else (i, i + dim / 2)


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Describes a mixture-of-experts MLP: a router picks `top_k` experts for each token; no token is dropped."""

    num_experts: int
    top_k: int
    ffn_size: int  # of one expert
    normalize: bool = True  # scale the routing weights of the chosen experts to sum to one
    shared_ffn_size: int = 0  # of the shared expert, which processes every token; 0: no shared expert
    shared_gate: bool = False  # scale the shared expert's output by a sigmoid gate
    dense_layers: tuple[int, ...] = ()  # layers with an ordinary MLP instead
    score: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False  # routing bias: added to scores only to choose experts; gets no gradient
    groups: int = 1  # of equally many experts; a token's experts come from its best `top_groups` groups
    top_groups: int = 1
    group_best: int = 1  # a group's score is the sum of its `group_best` highest expert scores
    scale: float = 1.0  # of the routed experts' output
    bias: bool = False  # on router and experts


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Describes multi-head latent attention (MLA, arXiv 2405.04434): keys and values come from a low-rank vector."""

    query_rank: int | None  # None: queries are projected from the hidden state directly
    rank: int  # of keys and values
    nope_dim: int  # dimensions of a query or key head that are not rotated, besides the `Rope.dim` rotary ones
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Holds the sizes of any decoder that data, micro-batches and every engine need."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    max_positions: int | None  # None: no limit
    attention_cost: float  # of a pair of positions, relative to the rest of a position's cost


def attention_cost(num_layers: int, heads_size: int, *, attention_size: int, ffn_size: float) -> float:
    """Return the cost of a pair of positions in causal attention, relative to the rest of a position's cost.

    Counts the FLOPs of matrix products (PaLM, arXiv 2204.02311, appendix B); half of the pairs are masked.
    heads_size: dimensions of all heads' keys and values together. attention_size: number of attention weights in one
    layer. ffn_size: number of MLP weights that a token uses, in all layers.
    """
    return num_layers * heads_size / 2 / (attention_size * num_layers + ffn_size)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Describes a decoder with gated MLPs, RMSNorm, rotary embeddings and grouped-query attention."""

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
    sliding_rope: Rope | None = None  # of sliding-window layers, where it differs
    rope_fp32: bool = False  # rotate queries and keys in fp32, then round to half precision
    no_rope_layers: tuple[int, ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None  # over each head's dimensions, or over all heads together
    pre_norm: bool = True  # before attention and MLP
    post_norm: bool = False  # on their outputs, before the residual addition
    norm_offset: float = 0.0  # norms multiply by (norm_offset + weight)
    norm_fp32: bool = False  # multiply by the norm's weight in fp32, before rounding to the model's dtype
    activation: Literal["silu", "gelu_tanh", "clamped_swiglu"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of the outputs of attention and MLP
    attention_scale: float | None = None  # of attention logits; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # soft cap (tanh) on attention logits
    sinks: bool = False  # attention sinks: a learned extra logit per head in the attention softmax
    logit_scale: float = 1.0  # of the output logits
    logit_softcap: float | None = None  # soft cap (tanh) on the scaled output logits
    moe: MoeConfig | None = None
    latent: LatentConfig | None = None
    sliding_window: int | None = None  # a token attends to itself and the `sliding_window - 1` before it
    full_layers: tuple[int, ...] = ()  # layers with full attention nevertheless

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) routes tokens to experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def window(self, layer: int) -> int | None:
        """Return a layer's attention window, the token's own position included; None: full causal attention."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """List the different rotary embeddings of the layers."""
        return (self.rope,) if self.sliding_rope is None else (self.rope, self.sliding_rope)

    def rope_of(self, layer: int) -> int | None:
        """Return the index in `ropes` of a layer's rotary embedding; None: it has none (NoPE)."""
        if layer in self.no_rope_layers:
            return None
        return int(self.sliding_rope is not None and self.window(layer) is not None)

    @property
    def key_dim(self) -> int:
        """Return the dimension of a head's queries and keys."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.rope.dim

    @property
    def value_dim(self) -> int:
        """Return the dimension of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def is_plain(self) -> bool:
        """Whether every layer is as in Llama, Qwen3 or Mixtral, which TransformerEngine's layers can compute."""
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
        """Return the rows of embedding and head in Megatron: vocab_size rounded up to a multiple of 128.

        It does not depend on the tensor-parallel size, so neither checkpoints nor results do. 128 is divisible by every
        power of two up to 128, which the equal tiles of `ops.vocab.tile_rows` need.
        """
        return -(-self.vocab_size // 128) * 128

    @property
    def attention_cost(self) -> float:
        """Return the function `attention_cost` of this model, where MLA counts as projections of full rank."""
        heads = self.num_heads * (self.key_dim + self.value_dim)
        attention = self.hidden_size * (heads + self.num_kv_heads * (self.key_dim + self.value_dim))
        moe = self.moe
        dense = sum(not self.has_experts(layer) for layer in range(self.num_layers)) * self.ffn_size
        routed = 0 if moe is None else moe.top_k * moe.ffn_size + moe.shared_ffn_size
        experts = sum(self.has_experts(layer) for layer in range(self.num_layers)) * routed
        ffn = 3 * self.hidden_size * (dense + experts)
        return attention_cost(self.num_layers, heads, attention_size=attention, ffn_size=ffn)

    @property
    def facts(self) -> ModelFacts:
        """Return the sizes that any decoder has."""
        return ModelFacts(
            self.vocab_size,
            self.num_layers,
            self.hidden_size,
            self.num_heads,
            self.num_kv_heads,
            self.max_positions,
            self.attention_cost,
        )


@dataclass(frozen=True, slots=True)
class Lora:
    """Settings of LoRA adapters (arXiv 2106.09685): rank, alpha, and the adapted layers by Hugging Face name."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
