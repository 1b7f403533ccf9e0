"""The facts of any decoder from its config.json, of families in our tables and others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from megalign.convert.hf.model import facts_of, read_model
from megalign.schema import UserError
from tests.support.auto_checkpoints import write_auto_checkpoint

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def written(folder: Path, config: transformers.PretrainedConfig, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (transformers.LlamaConfig(**SIZES), "LlamaForCausalLM"),
        (transformers.Qwen3Config(**SIZES, head_dim=8), "Qwen3ForCausalLM"),
        (transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), "MixtralForCausalLM"),
        (
            transformers.Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=24, num_experts_per_tok=3),
            "Qwen3MoeForCausalLM",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_common_fields_say_what_our_tables_say(tmp_path, config, architecture):
    model = read_model(written(tmp_path, config, architecture))
    assert model.config is not None and model.facts == model.known().facts
    assert model.facts.vocab_size == 131 and model.facts.num_kv_heads == 2
    assert facts_of(tmp_path / "config.json", model.hf) == model.facts


def test_a_family_that_our_tables_lack(tmp_path):
    config = transformers.GPT2Config(vocab_size=131, n_embd=48, n_layer=3, n_head=8, n_positions=64)
    model = read_model(written(tmp_path, config, "GPT2LMHeadModel"))
    facts = model.facts
    assert (facts.vocab_size, facts.hidden_size, facts.num_layers, facts.num_heads) == (131, 48, 3, 8)
    assert (facts.num_kv_heads, facts.max_positions) == (8, 64)
    # A pair costs 2 x 48 multiplications, half of it masked; a position 4 matrices of 48 x 48 and 2 of 48 x 192.
    assert facts.attention_cost == pytest.approx(48 / (4 * 48 * 48 + 2 * 48 * 192))
    with pytest.raises(UserError, match="architectures is .*GPT2LMHeadModel"):
        model.known()


@pytest.mark.parametrize("name", ["Falcon", "GPTNeoX", "OPT", "Phi", "Cohere", "Gemma3", "Qwen3Next", "Mpt", "Bloom"])
def test_the_configurations_of_transformers_give_facts(tmp_path, name):
    config = getattr(transformers, f"{name}Config")()
    facts = read_model(written(tmp_path, config, f"{name}Unknown")).facts
    text = config.get_text_config()
    assert (facts.vocab_size, facts.num_layers) == (text.vocab_size, text.num_hidden_layers)
    assert (facts.hidden_size, facts.num_heads) == (text.hidden_size, text.num_attention_heads)
    assert 0 < facts.attention_cost < 1


# (layers, hidden size, heads, key-value heads, positions) of the tiny checkpoints, by hand from their fields
FACTS = {
    "stablelm": (3, 48, 6, 2, 64),
    "olmoe": (3, 48, 6, 2, 64),
    "granitemoe": (3, 48, 6, 2, 64),
    "gpt2": (3, 48, 6, 6, 64),
    "phi": (3, 48, 6, 2, 64),
    "phimoe": (3, 48, 6, 2, 64),
    "gpt_neox": (3, 48, 6, 6, 64),
    "opt": (3, 48, 6, 6, 64),
    "falcon": (3, 48, 6, 1, 64),  # one key-value head for all
    "starcoder2": (3, 48, 6, 2, 64),
    "cohere2": (3, 48, 6, 2, 64),
    "bloom": (3, 48, 6, 6, None),  # distances, not positions
    "mamba": (3, 48, 1, 1, None),  # no attention
    "jetmoe": (2, 48, 6, 3, 64),  # each token's 2 experts of attention have 3 heads
    "dbrx": (2, 48, 6, 2, 64),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_families_that_our_tables_lack(tmp_path, name):
    facts = read_model(write_auto_checkpoint(tmp_path, name)).facts
    wanted = (facts.num_layers, facts.hidden_size, facts.num_heads, facts.num_kv_heads, facts.max_positions)
    assert (facts.vocab_size, *wanted) == (131, *FACTS[name])
    assert 0 <= facts.attention_cost < 1 and (facts.attention_cost == 0) == (name == "mamba")


def test_the_text_of_several_modalities_counts(tmp_path):
    text = {**SIZES, "head_dim": 8, "model_type": "gemma3_text"}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**hf, "vision_config": {"hidden_size": 32}}))
    facts = read_model(tmp_path).facts
    assert (facts.vocab_size, facts.num_layers, facts.hidden_size) == (131, 3, 48)
    assert (facts.num_heads, facts.num_kv_heads, facts.max_positions) == (8, 2, 64)


def test_what_lacks_a_number_is_refused_by_our_tables_word(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "vocab_size": 131}))
    with pytest.raises(UserError, match="architectures is .*MambaForCausalLM"):
        read_model(tmp_path)
