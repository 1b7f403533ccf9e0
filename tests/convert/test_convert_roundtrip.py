"""Hugging Face -> shards -> Hugging Face gives every bit back, and the layout in between is Megatron's."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalign.convert import HFWriter, hf_parts, hf_state, load_shard, megatron_names, read_model_config, unshard
from tests.support.tiny_checkpoints import CASES, COMPANIONS, EXPERT_CASES, write_checkpoint


def stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_bitwise(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def whole_model(folder, cfg, tp_size, ep_size=1):
    """All parameters, put together again from the shards of `tp_size` ranks, experts in `ep_size` parts.

    What is no expert's lies in every part, and comes from the first.
    """
    seen = set()
    for part in range(ep_size):
        each = 0 if cfg.moe is None else cfg.moe.num_experts // ep_size
        experts = range(part * each, (part + 1) * each)
        names = megatron_names(cfg, layers=range(cfg.num_layers), first=True, last=True, experts=experts)
        new = [name for name in names if name not in seen]
        assert part == 0 or all(".local_experts." in name for name in new)
        seen.update(names)
        ranks = [load_shard(folder, cfg, new, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
        for parts in zip(*ranks, strict=True):
            yield parts[0][0], unshard(parts[0][0], [tensor for _, tensor in parts], cfg)


def export(folder, target, tp_size, ep_size=1, **options):
    cfg = read_model_config(folder)
    with HFWriter(target, source=folder, **{"dtype": None, **options}) as writer:
        for name, tensor in hf_state(cfg, whole_model(folder, cfg, tp_size, ep_size)):
            writer.add(name, tensor)
    return target


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("case", "ep_size"), [*((case, 1) for case in CASES), *((case, size) for case in EXPERT_CASES for size in (1, 2))]
)
def test_round_trip_is_bitwise(checkpoints, tmp_path, case, ep_size, tp_size):
    source = checkpoints(case)
    target = export(source, tmp_path / "out", tp_size, ep_size)
    assert_bitwise(stored(target), stored(source))
    for name in ["config.json", "generation_config.json", *COMPANIONS]:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_sharded_input_and_output(tmp_path):
    source = write_checkpoint(tmp_path / "in", "qwen3-bias", max_shard_size="20KB")
    num_files = len(list(source.glob("*.safetensors")))
    assert num_files > 2
    target = export(source, tmp_path / "out", 2, max_shard_bytes=20_000)
    assert_bitwise(stored(target), stored(source))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for path in target.glob("*.safetensors"):
        assert path.stat().st_size < 22_000 or len(load_file(path)) == 1
        assert all(index["weight_map"][name] == path.name for name in load_file(path))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(source).values())
    assert set(index["weight_map"]) == set(stored(source))


def test_four_ranks_of_which_one_has_padding_alone(tmp_path):
    # 131 rows are padded to 256; four ranks own 64 each: 64, 64, 3 real ones and none
    source = write_checkpoint(
        tmp_path / "in", "llama-bias", hidden_size=32, num_attention_heads=8, num_key_value_heads=4
    )
    cfg = read_model_config(source)
    name = "embedding.word_embeddings.weight"
    parts = [dict(load_shard(source, cfg, [name], tp_rank=rank, tp_size=4))[name] for rank in range(4)]
    embedding = stored(source)["model.embed_tokens.weight"]
    assert [tuple(part.shape) for part in parts] == [(64, 32)] * 4
    assert torch.equal(torch.cat(parts)[:131], embedding)
    assert not torch.cat(parts)[131:].any()
    assert_bitwise(stored(export(source, tmp_path / "out", 4)), stored(source))


@pytest.mark.parametrize("case", ["llama-bias", "qwen2", "qwen3-bias", "mistral"])
def test_qkv_layout_by_a_slow_loop(checkpoints, case):
    source, tp_size = checkpoints(case), 2
    cfg, tensors = read_model_config(source), stored(source)
    prefix, hf = "decoder.layers.1.self_attention.linear_qkv", "model.layers.1.self_attn"
    for kind in ["weight", "bias"] if cfg.qkv_bias else ["weight"]:
        query, key, value = (tensors[f"{hf}.{letter}_proj.{kind}"] for letter in "qkv")
        for rank in range(tp_size):
            expected = []
            for group in range(rank * 2 // tp_size, (rank + 1) * 2 // tp_size):
                for head in range(group * 3, group * 3 + 3):
                    expected += [query[head * cfg.head_dim + row] for row in range(cfg.head_dim)]
                expected += [key[group * cfg.head_dim + row] for row in range(cfg.head_dim)]
                expected += [value[group * cfg.head_dim + row] for row in range(cfg.head_dim)]
            ((_, part),) = load_shard(source, cfg, [f"{prefix}.{kind}"], tp_rank=rank, tp_size=tp_size)
            assert torch.equal(part, torch.stack(expected))


def test_layout_of_the_other_parameters(checkpoints):
    source = checkpoints("llama-bias")
    cfg, tensors = read_model_config(source), stored(source)
    layer, hf = "decoder.layers.0", "model.layers.0"
    gate, up, down = (tensors[f"{hf}.mlp.{name}_proj.weight"] for name in ["gate", "up", "down"])
    gate_bias, up_bias = tensors[f"{hf}.mlp.gate_proj.bias"], tensors[f"{hf}.mlp.up_proj.bias"]
    expected = {  # of rank 1 of 2: the upper half of 40 ffn rows, heads 3 to 5 of size 4
        f"{layer}.mlp.linear_fc1.weight": torch.cat([gate[20:], up[20:]]),
        f"{layer}.mlp.linear_fc1.bias": torch.cat([gate_bias[20:], up_bias[20:]]),
        f"{layer}.mlp.linear_fc2.weight": down[:, 20:],
        f"{layer}.mlp.linear_fc2.bias": tensors[f"{hf}.mlp.down_proj.bias"],
        f"{layer}.self_attention.linear_proj.weight": tensors[f"{hf}.self_attn.o_proj.weight"][:, 12:],
        f"{layer}.self_attention.linear_proj.bias": tensors[f"{hf}.self_attn.o_proj.bias"],
        f"{layer}.input_layernorm.weight": tensors[f"{hf}.input_layernorm.weight"],
        f"{layer}.pre_mlp_layernorm.weight": tensors[f"{hf}.post_attention_layernorm.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": torch.cat([tensors["lm_head.weight"][128:], torch.zeros(125, 24)]),
    }
    assert_bitwise(dict(load_shard(source, cfg, list(expected), tp_rank=1, tp_size=2)), expected)


def test_names_of_stages(checkpoints):
    cfg = read_model_config(checkpoints("qwen3-tied"))
    layer = {
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    first = megatron_names(cfg, layers=[0], first=True, last=False)
    last = megatron_names(cfg, layers=[1], first=False, last=True)
    assert set(first) == {f"decoder.layers.0.{name}" for name in layer} | {"embedding.word_embeddings.weight"}
    ends = {"decoder.final_layernorm.weight", "output_layer.weight"}
    assert set(last) == {f"decoder.layers.1.{name}" for name in layer} | ends
    assert "output_layer.weight" not in megatron_names(cfg, layers=[0, 1], first=True, last=True)
    biased = megatron_names(read_model_config(checkpoints("llama-bias")), layers=[0, 1], first=True, last=True)
    for name in ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]:
        assert f"decoder.layers.1.{name}.bias" in biased
    assert "output_layer.weight" in biased
    assert len(biased) == len(set(biased)) == 3 + 2 * 10


def test_tied_head_is_read_and_not_written(checkpoints):
    source = checkpoints("qwen2-tied")
    cfg = read_model_config(source)
    ((name, head),) = load_shard(source, cfg, ["output_layer.weight"], tp_rank=0, tp_size=1)
    assert torch.equal(head[:131], stored(source)["model.embed_tokens.weight"])
    assert hf_parts(name, unshard(name, [head], cfg), cfg) == []


def test_padded_tensor_is_not_taken_for_a_whole_one(checkpoints):
    cfg = read_model_config(checkpoints("qwen2"))
    with pytest.raises(ValueError, match=r"lm_head.weight of shape \(256, 24\), not \(131, 24\)"):
        hf_parts("output_layer.weight", torch.zeros(256, 24), cfg)


def test_unknown_parameter_is_refused(checkpoints):
    cfg = read_model_config(checkpoints("mistral"))
    for name in ["decoder.layers.2.mlp.linear_fc2.weight", "decoder.layers.0.mlp.linear_fc2.bias", "head"]:
        with pytest.raises(ValueError, match="is not a parameter of this mistral model"):
            hf_parts(name, torch.zeros(1), cfg)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel tells here which pages were touched")
def test_reads_no_more_than_its_rows(tmp_path):
    # 32768 x 128 float32 rows are 16 MiB a matrix, a quarter is 4 MiB; the kernel may map 2 MiB more at either end
    sizes = {"vocab_size": 32768, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = write_checkpoint(tmp_path / "in", "llama-bias", **sizes)
    cfg = read_model_config(source)
    shard = load_shard(source, cfg, ["embedding.word_embeddings.weight"], tp_rank=1, tp_size=4)
    _, part = next(shard)
    assert 4 * 1024 <= resident_kib(source / "model.safetensors") <= 9 * 1024
    assert torch.equal(part, stored(source)["model.embed_tokens.weight"][8192:16384])
    shard.close()


def resident_kib(path):
    """Pages of a mapped file that this process has touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    token = torch.randint(131, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(token).logits


@pytest.mark.parametrize("case", ["llama-bias", "llama-tied", "mistral", "qwen2-tied", "qwen3-tied", *EXPERT_CASES])
def test_export_loads_with_equal_logits(checkpoints, tmp_path, case):
    source = checkpoints(case)
    target = export(source, tmp_path / "out", 2, max_shard_bytes=15_000)
    ours, theirs = logits(target), logits(source)
    assert ours.dtype == getattr(torch, {**CASES, **EXPERT_CASES}[case][1])
    assert ours.std() > 0.1
    assert torch.equal(ours, theirs)


def test_export_in_another_dtype(checkpoints, tmp_path):
    source = checkpoints("llama-tied")
    target = export(source, tmp_path / "out", 1, dtype=torch.float32)
    assert_bitwise(stored(target), {name: tensor.float() for name, tensor in stored(source).items()})
    before, after = (json.loads((folder / "config.json").read_text()) for folder in [source, target])
    assert before["dtype"] == "bfloat16"
    assert list(after.items()) == list({**before, "dtype": "float32"}.items())
