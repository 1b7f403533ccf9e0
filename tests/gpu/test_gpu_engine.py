"""The engine on a CUDA device against transformers on the same device; skipped where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from megalign.data.group import Response, TokenSequence
from megalign.data.micro_batch import pack
from megalign.runtime.distributed import process_group

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1031}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def write_model(folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1) if parameter.dim() > 1 else parameter.normal_(1.0, 0.1)
    model.save_pretrained(folder)


def ragged_sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, SIZES["vocab_size"], (count,), generator=generator).tolist())

    return [TokenSequence(i, i, "response", ids(5 + 7 * i), Response(ids(9 + 31 * i))) for i in range(5)]


def expected_logp(folder: Path, sequences: list[TokenSequence], dtype: torch.dtype) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda()
    found = []
    with torch.no_grad():
        for one in sequences:
            logits = model(torch.tensor([one.prompt_ids + one.response.ids]).cuda()).logits[0].float()
            target = torch.tensor(one.response.ids).cuda()
            first = len(one.prompt_ids) - 1
            rows = logits[first : first + len(target)].log_softmax(-1)
            found.append(rows.gather(1, target[:, None]).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize("layers", ["torch", "transformer_engine"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 0.15)])
def test_scores_and_gradients_on_the_device(tmp_path: Path, layers: str, dtype: torch.dtype, tolerance: float) -> None:
    """TF32 is off by default in torch; bf16 rounds to 8 bits, hence its tolerance on log-probs around -7."""
    if layers == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs TransformerEngine")
    from megalign.config.layout import Layout
    from megalign.convert import read_model_config
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions

    write_model(tmp_path)
    sequences = ragged_sequences()
    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(), timeout_s=60)
        options = EngineOptions(dtype=dtype, device=world.device, layers=layers)
        engine = MegatronEngine(read_model_config(tmp_path), groups, options, adamw=AdamW())
        engine.load_weights(tmp_path)
        batch = pack(sequences, range(len(sequences)))
        (found,) = engine.forward([batch])
        logp_N, lse_N = found.logp_N, found.lse_N
        torch.testing.assert_close(logp_N, expected_logp(tmp_path, sequences, dtype), rtol=0, atol=tolerance)

        def two_forms(place: int, head: object) -> tuple[torch.Tensor, None]:
            return head.weighted(torch.ones_like(logp_N), lse_N)[0], None  # type: ignore[attr-defined]

        norms = []
        for objective in (lambda place, head: (head.logp()[0].sum(), None), two_forms):
            engine.backward([batch], objective)
            norms.append(engine.update(0.0))
        assert norms[0] == pytest.approx(norms[1], rel=1e-3 if dtype == torch.float32 else 2e-2)
