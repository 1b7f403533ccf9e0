"""A decoder described without Hugging Face's names or Megatron's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """The experts that take the MLP's place: softmax router, `top_k` of them for each token, none dropped."""

    num_experts: int
    top_k: int
    ffn_size: int  # of one expert
    normalize: bool = True  # the chosen experts' probabilities are scaled to sum to one
    shared_ffn_size: int = 0  # of the expert that every token passes; 0: there is none
    shared_gate: bool = False  # a sigmoid of its own scales the shared expert's output
    dense_layers: tuple[int, ...] = ()  # layers that keep an ordinary MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers that fix a decoder: SwiGLU, RMSNorm, rotary positions, grouped queries, dense or with experts."""

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
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    logit_scale: float = 1.0  # the head's products are multiplied by it
    logit_softcap: float | None = None  # then bounded smoothly by it
    moe: MoeConfig | None = None
    sliding_window: int | None = None  # a token sees itself and the `sliding_window - 1` before it, in every layer

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) routes tokens to experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

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

        Counts multiplications of matrices (PaLM, arXiv 2204.02311, appendix B), half of the pairs being masked.
        """
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        moe = self.moe
        dense = sum(not self.has_experts(layer) for layer in range(self.num_layers)) * self.ffn_size
        routed = 0 if moe is None else moe.top_k * moe.ffn_size + moe.shared_ffn_size
        experts = sum(self.has_experts(layer) for layer in range(self.num_layers)) * routed
        per_token = attention * self.num_layers + 3 * self.hidden_size * (dense + experts)
        return self.num_layers * self.num_heads * self.head_dim / per_token
