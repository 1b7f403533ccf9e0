"""Experts: which tensors a rank holds, how they lie, and which models are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.convert import audit, hf_parts, load_shard, megatron_names, read_model_config, unshard
from megalign.model_config import MoeConfig
from megalign.schema import UserError
from tests.support.tiny_checkpoints import EXPERT_CASES, SIZES, write_checkpoint

ARCHITECTURES = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}
MOE = {
    "mixtral": MoeConfig(4, 2, 8),
    "mixtral-tied": MoeConfig(6, 3, 8),
    "qwen2-moe": MoeConfig(4, 2, 8, normalize=False, shared_ffn_size=16, shared_gate=True, dense_layers=(0,)),
    "qwen2-moe-tied": MoeConfig(4, 3, 8, shared_ffn_size=16, shared_gate=True),
    "qwen3-moe": MoeConfig(4, 2, 8, dense_layers=(1,)),
    "qwen3-moe-bias": MoeConfig(4, 1, 8, normalize=False),
}
# As published, before transformers 5.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_MOE_A2_7B = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_235B_A22B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 94,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model_config(folder)


def tiny(model_type, **changes):
    names = {"architectures": [f"{ARCHITECTURES[model_type]}ForCausalLM"], "model_type": model_type}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return {**names, **SIZES, **experts, **changes}


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_what_transformers_saved(checkpoints, case):
    cfg = read_model_config(checkpoints(case))
    model_type, _, tied, fields = EXPERT_CASES[case]
    assert (cfg.family, cfg.tied, cfg.moe) == (model_type, tied, MOE[case])
    assert cfg.ffn_size == fields.get("intermediate_size", 40)
    assert cfg.head_dim == fields.get("head_dim", 4)
    assert cfg.sliding_window == fields.get("sliding_window")
    assert cfg.qk_norm == ("head" if model_type == "qwen3_moe" else None)
    assert cfg.qkv_bias == (case in ("qwen2-moe", "qwen3-moe-bias"))
    assert cfg.out_bias == (case == "qwen3-moe-bias")
    assert cfg.norm_eps == (1e-5 if model_type == "mixtral" else 1e-6)
    audit(checkpoints(case), cfg)


def test_published_configurations(tmp_path):
    mixtral = read(tmp_path, MIXTRAL_8X7B)
    assert mixtral.moe == MoeConfig(8, 2, 14336)
    assert (mixtral.head_dim, mixtral.rope.theta, mixtral.qkv_bias, mixtral.sliding_window) == (128, 1e6, False, None)
    qwen2 = read(tmp_path, QWEN_MOE_A2_7B)
    assert qwen2.moe == MoeConfig(60, 4, 1408, normalize=False, shared_ffn_size=5632, shared_gate=True)
    assert (qwen2.ffn_size, qwen2.qkv_bias, qwen2.out_bias, qwen2.sliding_window) == (5632, True, False, None)
    qwen3 = read(tmp_path, QWEN3_235B_A22B)
    assert qwen3.moe == MoeConfig(128, 8, 1536)
    assert (qwen3.ffn_size, qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (12288, 128, "head", False)
    names = megatron_names(qwen3, layers=range(94), first=True, last=True)
    # a layer: 2 norms, 2 of queries and keys, 2 of attention, the router and two matrices an expert
    assert len(names) == len(set(names)) == 3 + 94 * (7 + 2 * 128)


def test_either_name_of_the_number(tmp_path):
    def count(**fields):
        return read(tmp_path, {**tiny("qwen3_moe"), **fields}).moe.num_experts

    assert count(num_experts=6) == count(num_experts=None, num_local_experts=6) == 6
    assert count(num_experts=6, num_local_experts=6) == count(num_experts=6, num_local_experts=None) == 6


def test_layers_without_experts(tmp_path):
    def dense(**fields):
        return read(tmp_path, {**tiny("qwen3_moe"), "num_hidden_layers": 6, **fields}).moe.dense_layers

    assert dense() == dense(mlp_only_layers=None) == dense(mlp_only_layers=[]) == ()
    assert dense(mlp_only_layers=[4, 0]) == (0, 4)
    assert dense(decoder_sparse_step=2) == (0, 2, 4)
    assert dense(decoder_sparse_step=3, mlp_only_layers=[5, 9]) == (0, 1, 3, 4, 5)


def test_windows(tmp_path):
    def window(model_type, **fields):
        return read(tmp_path, {**tiny(model_type), "use_sliding_window": True, "sliding_window": 8, **fields})

    # Qwen2-MoE: even layers below max_window_layers slide; Qwen3-MoE and Mixtral: all of them
    assert window("qwen2_moe", num_hidden_layers=1).sliding_window == 8
    assert window("qwen2_moe", max_window_layers=0).sliding_window is None
    assert window("qwen2_moe", layer_types=["sliding_attention"] * 2).sliding_window == 8
    assert window("qwen2_moe", use_sliding_window=False).sliding_window is None
    assert window("qwen2_moe").full_layers == (1,)
    assert window("qwen3_moe", max_window_layers=1).sliding_window == 8
    assert window("qwen3_moe", sliding_window=None).sliding_window is None
    assert window("qwen3_moe", use_sliding_window=False).sliding_window is None
    assert window("mixtral", use_sliding_window=False).sliding_window == 8


REFUSED = [
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5; must be at most num_experts, 4"),
    (
        "mixtral",
        {"num_experts_per_tok": 1},
        "num_experts_per_tok is 1; must be at least 2 where routing weights sum to one",
    ),
    ("mixtral", {"num_local_experts": 8}, "num_experts is 4; must agree with num_local_experts, 8"),
    ("mixtral", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "layer_types is"),
    ("qwen2_moe", {"num_experts": 0}, "num_experts is 0; must be a whole number >= 1"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0; must be a whole"),
    ("qwen2_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; must be true or false"),
    ("qwen2_moe", {"qkv_bias": "yes"}, "qkv_bias is 'yes'; must be true or false"),
    ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "num_experts_per_tok is 1; must be at least 2"),
    ("qwen3_moe", {"moe_intermediate_size": 8.0}, "moe_intermediate_size is 8.0; must be a whole number >= 1"),
    (
        "qwen3_moe",
        {"mlp_only_layers": [0, 1]},
        "mlp_only_layers is [0, 1]; must leave a layer with experts among the 2",
    ),
    ("qwen3_moe", {"decoder_sparse_step": 3}, "decoder_sparse_step is 3; must leave a layer with experts among the 2"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; must be a whole number >= 1"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers is ['0']; must be a list of layer numbers"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_refusals(tmp_path, model_type, changes, message):
    read(tmp_path, tiny(model_type))
    with pytest.raises(UserError) as error:
        read(tmp_path, tiny(model_type, **changes))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")
    assert "\n" not in str(error.value)


def test_what_changes_no_number_is_read_over(tmp_path):
    for model_type in ARCHITECTURES:
        plain = read(tmp_path, tiny(model_type))
        assert read(tmp_path, tiny(model_type, output_router_logits=True, router_aux_loss_coef=0.5)) == plain


def test_names_of_a_rank(checkpoints):
    cfg = read_model_config(checkpoints("qwen2-moe"))  # layer 0 is dense
    attention = {
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
    }
    dense = {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    routed = {
        "mlp.router.weight",
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.gate_weight",
        "mlp.experts.local_experts.2.linear_fc1.weight",
        "mlp.experts.local_experts.2.linear_fc2.weight",
        "mlp.experts.local_experts.3.linear_fc1.weight",
        "mlp.experts.local_experts.3.linear_fc2.weight",
    }
    names = megatron_names(cfg, layers=[0, 1], first=False, last=False, experts=range(2, 4))
    expected = [f"decoder.layers.0.{name}" for name in attention | dense]
    expected += [f"decoder.layers.1.{name}" for name in attention | routed]
    assert sorted(names) == sorted(expected)
    ranks = [megatron_names(cfg, layers=[1], first=True, last=True, experts=range(n, n + 2)) for n in (0, 2)]
    assert set(ranks[0]) | set(ranks[1]) == set(megatron_names(cfg, layers=[1], first=True, last=True))
    assert all(".local_experts." in name for name in set(ranks[0]) ^ set(ranks[1]))
    for name in [
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.local_experts.4.linear_fc1.weight",
        "decoder.layers.2.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.bias",
    ]:
        with pytest.raises(ValueError, match="is not a parameter of this qwen2_moe model"):
            hf_parts(name, torch.zeros(1), cfg)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_layout_of_qwen(checkpoints):
    source = checkpoints("qwen2-moe")
    cfg, tensors = read_model_config(source), load_file(source / "model.safetensors")
    dense, layer = "model.layers.0.mlp", "model.layers.1.mlp"
    gate, up, down = (tensors[f"{layer}.experts.3.{name}_proj.weight"] for name in ("gate", "up", "down"))
    one, two, three = (tensors[f"{layer}.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    expected = {  # of rank 1 of 2: the upper half of 40 dense rows and of 16 shared ones, and experts whole
        "decoder.layers.0.mlp.linear_fc1.weight": torch.cat(
            [tensors[f"{dense}.gate_proj.weight"][20:], tensors[f"{dense}.up_proj.weight"][20:]]
        ),
        "decoder.layers.0.mlp.linear_fc2.weight": tensors[f"{dense}.down_proj.weight"][:, 20:],
        "decoder.layers.1.mlp.router.weight": tensors[f"{layer}.gate.weight"],
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight": torch.cat([gate, up]),
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight": down,
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": torch.cat([one[8:], two[8:]]),
        "decoder.layers.1.mlp.shared_experts.linear_fc2.weight": three[:, 8:],
        "decoder.layers.1.mlp.shared_experts.gate_weight": tensors[f"{layer}.shared_expert_gate.weight"],
    }
    same(dict(load_shard(source, cfg, list(expected), tp_rank=1, tp_size=2)), expected)
    whole = {name: part for name, part in expected.items() if "router" in name or "local_experts" in name}
    for name, part in whole.items():
        assert unshard(name, [part, torch.zeros_like(part)], cfg) is part


def test_layout_of_mixtral(checkpoints):
    source = checkpoints("mixtral")
    cfg, tensors = read_model_config(source), load_file(source / "model.safetensors")
    block = "model.layers.1.block_sparse_moe"
    w1, w2, w3 = (tensors[f"{block}.experts.2.w{number}.weight"] for number in (1, 2, 3))
    expected = {
        "decoder.layers.1.mlp.router.weight": tensors[f"{block}.gate.weight"],
        "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight": torch.cat([w1, w3]),
        "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight": w2,
    }
    same(dict(load_shard(source, cfg, list(expected), tp_rank=0, tp_size=2)), expected)


def test_which_sizes_tensor_ranks_divide(tmp_path):
    def load(case, **changes):
        source = write_checkpoint(tmp_path / f"{case}-{len(list(tmp_path.iterdir()))}", case, **changes)
        return load_shard(source, read_model_config(source), [], tp_rank=0, tp_size=2)

    load("mixtral", intermediate_size=9)
    load("qwen2-moe-tied", moe_intermediate_size=7, intermediate_size=39)  # no layer is dense
    with pytest.raises(UserError, match="parallel.tensor is 2; must divide intermediate_size, 39"):
        load("qwen2-moe", intermediate_size=39)
    with pytest.raises(UserError, match="parallel.tensor is 2; must divide shared_expert_intermediate_size, 15"):
        load("qwen2-moe", shared_expert_intermediate_size=15)


DAMAGE = {
    "tensor model.layers.0.mlp.experts.3.up_proj.weight is missing": ("model.layers.0.mlp.experts.3.up_proj.weight", 0),
    "tensor model.layers.0.mlp.experts.4.up_proj.weight has no place": (
        "model.layers.0.mlp.experts.4.up_proj.weight",
        (8, 24),
    ),
    "tensor model.layers.1.mlp.gate.weight has no place": ("model.layers.1.mlp.gate.weight", (4, 24)),
    "tensor model.layers.0.mlp.gate.weight has shape [5, 24]; config.json asks for [4, 24]": (
        "model.layers.0.mlp.gate.weight",
        (5, 24),
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found_from_the_headers(tmp_path, message):
    folder = write_checkpoint(tmp_path / "model", "qwen3-moe")  # layer 1 is dense
    name, shape = DAMAGE[message]
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.ones(shape or (1,))
    if not shape:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        audit(folder, read_model_config(folder))
    assert message in str(error.value)
