"""Damaged checkpoints and unsafe targets are refused in one line, and nothing half-written is left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.convert import HFWriter, audit, load_shard, read_model_config, resolve_model
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.hf.writer import HFPart
from megalign.schema import UserError
from tests.support.families import write_family
from tests.support.tiny_checkpoints import write_checkpoint

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sharded") / "in", "qwen2", max_shard_size="10KB")


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "model")


def weight_map(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def change_index(folder, **changes):
    entries = {**weight_map(folder), **{key.replace("/", "."): value for key, value in changes.items()}}
    kept = {name: file for name, file in entries.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def change_tensors(folder, change, name=DOWN):
    path = folder / weight_map(folder)[name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def remove_everywhere(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(name), name)
    change_index(folder, **{name: None})


def truncate(folder):
    path = folder / weight_map(folder)[DOWN]
    path.write_bytes(path.read_bytes()[:-10])


def duplicate(folder):
    name = "model.embed_tokens.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(131, 24)}))


def add_to_other_layer(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": torch.ones(24, 40)}))


DAMAGE = {
    "is missing; model.safetensors.index.json names it": lambda f: (f / weight_map(f)[DOWN]).unlink(),
    "is not a complete safetensors file": truncate,
    f"tensor {DOWN} has shape [24, 39]; config.json asks for [24, 40]": lambda f: change_tensors(
        f, lambda tensors: tensors.update({DOWN: torch.ones(24, 39)})
    ),
    f"tensor {DOWN} is stored as I64; must be one of F64, F32, BF16, F16": lambda f: change_tensors(
        f, lambda tensors: tensors.update({DOWN: torch.ones(24, 40, dtype=torch.int64)})
    ),
    f"tensor {DOWN} is missing; Qwen2ForCausalLM (config.json) needs it": lambda f: remove_everywhere(f, DOWN),
    "tensor model.layers.2.mlp.down_proj.weight has no place in this Qwen2ForCausalLM": add_to_other_layer,
    "tensor model.embed_tokens.weight is also in": duplicate,
    f"weight_map.{DOWN} is '../x.safetensors'; must be a file beside the index": lambda f: change_index(
        f, **{DOWN: "../x.safetensors"}
    ),
    "; that file does not hold the tensor": lambda f: change_index(f, **{DOWN: weight_map(f)["lm_head.weight"]}),
    "weight_map is {}; must be tensor names": lambda f: (f / INDEX).write_text('{"weight_map": {}}'),
    "holds neither model.safetensors nor model.safetensors.index.json": lambda f: (f / INDEX).unlink(),
    f"{INDEX} is a Git LFS pointer, not the file of 12345 bytes": lambda f: (f / INDEX).write_text(POINTER),
    ".safetensors is a Git LFS pointer": lambda f: (f / weight_map(f)[DOWN]).write_text(POINTER),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found_from_the_headers(folder, message):
    cfg = read_model_config(folder)
    audit(folder, cfg)
    DAMAGE[message](folder)
    with pytest.raises(UserError) as error:
        load_shard(folder, cfg, [], tp_rank=0, tp_size=1)
    assert message in str(error.value)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_duplicate_head_of_a_tied_model(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "llama-tied")
    cfg = read_model_config(folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    inverse = torch.ones(2)
    extra = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": inverse}
    name = "embedding.word_embeddings.weight"
    save_file({**tensors, **extra}, folder / "model.safetensors")
    ((_, part),) = load_shard(folder, cfg, [name], tp_rank=0, tp_size=2)
    assert torch.equal(part, head[:128])
    head[130] += 1
    save_file({**tensors, **extra}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        list(load_shard(folder, cfg, [name], tp_rank=1, tp_size=2))


def test_layouts_that_do_not_divide(sharded):
    cfg = read_model_config(sharded)
    with pytest.raises(UserError, match="parallel.tensor is 4; must divide num_key_value_heads, 2"):
        load_shard(sharded, cfg, [], tp_rank=0, tp_size=4)


def test_resolve_model(folder):
    assert resolve_model(str(folder)) == folder
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="only safetensors are read, never pickles"):
        resolve_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="holds no config.json"):
        resolve_model(str(folder))
    with pytest.raises(UserError, match="nowhere is not a directory"):
        resolve_model("nowhere")
    with pytest.raises(UserError, match="must be hf://org/name or hf://org/name@revision"):
        resolve_model("hf://name")


def test_hub_model_that_is_not_there(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hf://org/name@main could not be downloaded .*give the directory") as error:
        resolve_model("hf://org/name@main")
    assert "\n" not in str(error.value)


def copy_all(source, target, **options):
    with HFWriter(target, source=source, **{"dtype": None, **options}) as writer:
        for path in sorted(source.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                writer.add(name, tensor)


def test_target_that_is_taken(sharded, folder, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    copy_all(sharded, target)  # an empty directory is as good as none
    with pytest.raises(UserError, match="exists and is not empty; must be a new or empty directory"):
        copy_all(sharded, target)
    copy_all(sharded, target, overwrite=True)
    assert audit(target, read_model_config(target)).keys() == audit(sharded, read_model_config(sharded)).keys()
    with pytest.raises(UserError, match="is the model the export starts from"):
        copy_all(folder, folder, overwrite=True)
    refused = "not empty; must be a new or empty directory, or an earlier export"
    with pytest.raises(UserError, match=refused):  # somebody else's checkpoint
        copy_all(sharded, folder, overwrite=True)
    (target / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match=refused):
        copy_all(sharded, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "kept"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file exists and is not a directory"):
        copy_all(sharded, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "out"]


def test_what_killed_exports_left_is_removed(sharded, tmp_path):
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out.partial-dead" / "model.safetensors").write_text("half")
    alive = HFWriter(tmp_path / "out", source=sharded, dtype=torch.bfloat16)
    copy_all(sharded, tmp_path / "out")
    left = [path for path in tmp_path.iterdir() if path.name != "out"]
    assert left == [alive.partial.path]
    alive.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(sharded, tmp_path):
    with (
        pytest.raises(KeyError),
        HFWriter(tmp_path / "out", source=sharded, dtype=None, max_shard_bytes=100) as writer,
    ):
        for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
            writer.add(name, torch.ones(24))
        assert [path.name.startswith(".out.partial") for path in tmp_path.iterdir()] == [True]
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_with_a_hole_is_not_published(sharded, tmp_path):
    writer = HFWriter(tmp_path / "out", source=sharded, dtype=None)
    writer.add("model.norm.weight", torch.ones(24))
    with pytest.raises(ValueError, match="model.norm.weight was added twice"):
        writer.add("model.norm.weight", torch.ones(24))
    with pytest.raises(RuntimeError, match="is not a whole checkpoint.* is missing"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_what_was_added_may_change_afterwards(sharded, tmp_path):
    tensors = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    with HFWriter(tmp_path / "out", source=sharded, dtype=None) as writer:
        for name, tensor in tensors.items():
            live = tensor.clone()
            writer.add(name, live)
            live.zero_()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_several_write_one_checkpoint(tmp_path):
    source = write_family(tmp_path / "in", "gpt-oss")
    tensors = load_file(source / "model.safetensors")
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def write(writer, *, leave_out=None, twice=None):
        shared = writer.share()
        parts = [HFPart(shared) for _ in range(3)]
        for place, (name, tensor) in enumerate(tensors.items()):
            if name != stack:
                parts[place % 3].add(name, tensor)
        for expert in {0, 1, 2, 3} - {leave_out}:
            parts[expert % 3].add(stack, tensors[stack][expert], expert)
        if twice is not None:
            parts[(twice + 1) % 3].add(stack, tensors[stack][twice], twice)
        for part in parts:
            writer.received(part.close())

    with HFWriter(tmp_path / "out", source=source, specs=specs, max_shard_bytes=30_000) as writer:
        write(writer)
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    with (
        pytest.raises(RuntimeError, match=f"is not a whole checkpoint: .'{stack}'. is missing"),
        HFWriter(tmp_path / "hole", source=source, specs=specs) as writer,
    ):
        write(writer, leave_out=2)
    with (
        pytest.raises(ValueError, match=f"{stack} was added twice"),
        HFWriter(tmp_path / "twice", source=source, specs=specs) as writer,
    ):
        write(writer, twice=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
