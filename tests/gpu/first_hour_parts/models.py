"""Random models of the first hour, their sequences, and an engine on one device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megalign.data.group import Response, TokenSequence
from tests.gpu.first_hour_parts.device import CUDA

# Qwen2 of 0.5B, and one as small as the code paths allow; more layers than host waits of a micro-batch.
QWEN2 = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
SMALL_QWEN2 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 53, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_EXPERTS = EXPERTS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 131, "num_experts": 8, "moe_intermediate_size": 16,
}  # fmt: skip


def write_model(folder: Path, model_type: str, sizes: dict[str, Any], *, std: float = 0.02) -> Path:
    """Save a random model in bf16; its weights are drawn with `std`."""
    import transformers

    torch.manual_seed(0)
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **ids, initializer_range=std)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def ragged(count: int, longest: int, vocabulary: int) -> list[TokenSequence]:
    """Draw sequences of a quarter up to `longest` tokens, a third of each its prompt; one group each."""
    random = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        length = int(torch.randint(longest // 4, longest + 1, (), generator=random))
        ids = tuple(torch.randint(1, vocabulary, (length,), generator=random).tolist())
        found.append(TokenSequence(number, number, "response", ids[: length // 3], Response(ids[length // 3 :])))
    return found


@contextlib.contextmanager
def engine_of(folder: Path) -> Iterator[Any]:
    """Yield the Megatron engine with a model's weights in bf16 on the device, in a job of one process."""
    from megalign.config.layout import Layout
    from megalign.convert import read_model_config
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=120) as world:
        assert world.device.type == "cuda"
        groups = make_groups(Layout(), timeout_s=120)
        engine = MegatronEngine(read_model_config(folder), groups, EngineOptions(torch.bfloat16, CUDA), adamw=AdamW())
        engine.load_weights(folder)
        yield engine
