"""Checkpoints of families that our tables lack: what is refused, other layouts, exports, noise in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalign.convert.hf.auto_model import auto_config, meta_model, switch_off_noise
from megalign.convert.hf.auto_names import AutoNames
from megalign.convert.hf.auto_source import AutoSource, check_auto_weights
from megalign.convert.hf.config import noise_left_out
from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.digest import weights_digest
from megalign.convert.hf.model import read_model
from megalign.convert.hf.weight_files import SINGLE
from megalign.convert.hf.writer import HFPart, HFWriter, specs_of
from megalign.schema import UserError
from tests.support.auto_checkpoints import write_auto_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Each case that is asked for once, as a read-only directory."""
    root = tmp_path_factory.mktemp("auto")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write_auto_checkpoint(root / name, name)

    return folder


@pytest.fixture
def changed(written, tmp_path):
    """Copies a case with its tensors or its config.json changed."""

    def copy(name: str, change=lambda tensors: tensors, **fields: object) -> Path:
        folder = tmp_path / f"{name}-changed"
        shutil.copytree(written(name), folder, dirs_exist_ok=True)
        save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **fields}))
        return folder

    return copy


def read(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint as the model's tensors."""
    source = AutoSource(read_model(folder), AutoNames(meta_model(folder)))
    return {name: tensor.clone() for name, tensor in source}


def without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
WRONG = {
    "missing": ("stablelm", without("model.layers.1.mlp.up_proj.weight"),
                r"tensor model.layers.1.mlp.up_proj.weight is missing; StableLmForCausalLM \(config.json\) needs it"),
    "missing head bias": ("phi", without("lm_head.bias"), "tensor lm_head.bias is missing; Phi"),
    "unknown": ("stablelm", lambda tensors: {**tensors, "extra": torch.ones(2)}, "tensor extra has no place in this "
                "StableLmForCausalLM"),
    "shape": ("stablelm", lambda tensors: {**tensors, "model.norm.weight": torch.ones(47)},
              r"tensor model.norm.weight has shape \[47\]; config.json asks for \[48\]"),
    "expert missing": ("olmoe", without(EXPERT), f"tensor {EXPERT} is missing; Olmoe"),
    "last expert": ("mixtral", lambda tensors: {key: tensors[key] for key in tensors if ".experts.4." not in key},
                            r"tensor model.layers.0.\S+experts.4.w1.weight is missing \(and 1 more\)"),
    "expert's shape": ("olmoe", lambda tensors: {**tensors, EXPERT: torch.ones(31, 48)},
                       rf"tensor {EXPERT} has shape \[31, 48\]; config.json asks for \[32, 48\]"),
    "integers": ("stablelm", lambda tensors: {**tensors, "model.norm.weight": torch.ones(48, dtype=torch.int8)},
                 "tensor model.norm.weight is stored as I8; must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(changed, case):
    name, change, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        check_auto_weights(read_model(changed(name, change)))
    assert "\n" not in str(error.value)


def test_a_tied_head_stored_beside(changed, written):
    plain = read(written("gpt2"))
    same = changed("gpt2", lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
    assert all(torch.equal(plain[name], tensor) for name, tensor in read(same).items())
    only = changed(
        "gpt2", lambda tensors: {key.replace("transformer.wte", "lm_head"): value for key, value in tensors.items()}
    )
    assert all(torch.equal(plain[name], tensor) for name, tensor in read(only).items())
    other = changed("gpt2", lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    check_auto_weights(read_model(other))  # reads no values
    with pytest.raises(UserError, match="lm_head.weight differs from transformer.wte.weight although tie_word"):
        read(other)


def test_layouts_that_transformers_reads(changed, written):
    """The base model's names with stored tables, as gpt2 was published; experts stacked in the file."""
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    gpt2 = changed(
        "gpt2", lambda tensors: masks | {key.removeprefix("transformer."): value for key, value in tensors.items()}
    )
    plain = read(written("gpt2"))
    assert all(torch.equal(plain[name], tensor) for name, tensor in read(gpt2).items())
    stacked = read(written("olmoe"))
    folder = changed("olmoe", lambda tensors: {name: tensor.contiguous() for name, tensor in stacked.items()})
    assert all(torch.equal(stacked[name], tensor) for name, tensor in read(folder).items())


def test_quantised_experts_are_dequantised(changed, written):
    def quantise(tensors):
        weight = tensors[EXPERT]
        return {**tensors, EXPERT: weight.to(torch.float8_e4m3fn), f"{EXPERT}_scale_inv": torch.tensor([[2.0]])}

    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = changed("olmoe", quantise, quantization_config=method, dtype="float32")
    values = read(folder)["model.layers.1.mlp.experts.gate_up_proj"]
    wanted = load_file(written("olmoe") / SINGLE)[EXPERT].to(torch.float8_e4m3fn).float() * 2
    assert torch.equal(values[3, 32:], wanted)


@pytest.mark.parametrize("name", ["stablelm", "olmoe", "gpt2", "mamba", "glm4_moe"])
def test_an_export_of_any_family(written, tmp_path, name):
    source = read_model(written(name))
    assert source.config is None
    names, target = AutoNames(meta_model(source.folder, dtype=torch.bfloat16)), tmp_path / "out"
    module = read(source.folder)
    with HFWriter(target, source=source.folder, specs=specs_of(source, torch.bfloat16)) as writer:
        part = HFPart(writer.share())
        for group in names.groups:
            for key, tensor in names.to_checkpoint({key: module[key] for key in group.module}).items():
                part.add(key, tensor)
        writer.received(part.close())
    stored = load_file(target / SINGLE)
    assert read_json(target / "config.json")["dtype"] == "bfloat16"
    for key, value in load_file(source.folder / SINGLE).items():
        dtype = torch.float32 if key.endswith("e_score_correction_bias") else torch.bfloat16
        assert stored[key].dtype == dtype and torch.equal(stored[key], value.to(dtype)), key
    again = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert again.dtype == torch.bfloat16
    assert weights_digest(target) != weights_digest(source.folder) == weights_digest(written(name))


def test_an_export_with_a_hole_is_not_published(written, tmp_path):
    tensors = load_file(written("stablelm") / SINGLE)
    writer = HFWriter(
        tmp_path / "out", source=written("stablelm"), specs=specs_of(read_model(written("stablelm")), torch.float32)
    )
    for name, tensor in list(tensors.items())[1:]:
        writer.add(name, tensor)
    with pytest.raises(RuntimeError, match="is not a whole checkpoint"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "megachat"}, "config.json: model_type is 'megachat', which cannot be built .*must be a causal"),
        ({"model_type": "mega", "auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}},
         r"model_type is 'mega' with code of its own \(auto_map\); must be a causal language model of transformers 5"),
        ({"model_type": "bert"}, "is_decoder is False: BertLMHeadModel attends to later positions; must be true"),
        ({"model_type": "roformer"}, "is_decoder is False: RoFormerForCausalLM attends to later"),
        ({"model_type": "bart"}, "is_encoder_decoder is True; must be a model without an encoder"),
        ({"model_type": "vit"}, "model_type is 'vit', which cannot be built"),
        ({"model_type": "reformer"}, "model_type is 'reformer', which hashes positions at random; must be another"),
        ({"model_type": "stablelm", "hidden_size": "wide"}, "'stablelm', which cannot be built .*hidden_size"),
        ({"model_type": "stablelm", "compression_config": {}}, "compression_config is {}; compressed checkpoints"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_build(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message) as error:
        meta_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["phimoe", "dbrx", "mixtral", "gpt2", "opt", "gpt_neox"])
def test_training_mode_computes_what_scoring_does(written, name):
    """Dropout, router noise and random choices of experts are all off."""
    folder, ids = written(name), torch.tensor([[3, 130, 7, 7, 64, 12, 99, 5, 31, 8, 2]])
    noisy = transformers.AutoModelForCausalLM.from_pretrained(folder)
    scored = noisy.eval()(ids).logits
    torch.manual_seed(1)
    assert not torch.equal(noisy.train()(ids).logits, scored)
    switch_off_noise(noisy)
    assert torch.equal(noisy.train()(ids).logits, scored)
    assert auto_config(folder).use_cache is False


def test_noise_that_a_config_asks_for_is_told():
    asked = {"attn_pdrop": 0.1, "layerdrop": 0.2, "router_jitter_noise": 0.3, "hidden_dropout_prob": 0.0}
    unused = {"classifier_dropout": 0.1, "summary_first_dropout": 0.1, "token_dropout": True, "dropout": None}
    told = noise_left_out({**asked, **unused, "text_config": {"attention_dropout": 0.4}})
    assert told.endswith("asks for it: attn_pdrop 0.1, layerdrop 0.2, router_jitter_noise 0.3, attention_dropout 0.4")
    assert noise_left_out({"model_type": "phimoe", "router_jitter_noise": 0.01}) == ""
