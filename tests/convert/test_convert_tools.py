"""The conversion tools as a user has them: damaged input is one line and code 2, and nothing of the output is left."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.commands import convert, export, verify
from megalign.convert.report import compare
from megalign.convert.transfer import ConversionOptions, hf_to_megatron, megatron_to_hf
from megalign.schema import UserError
from tests.support.checkpoint_dirs import describe_files
from tests.support.families import write_family
from tests.support.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
DOWN, KEY, EMBED, NORM = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
)


TOOLS = {"hf_to_megatron": convert, "megatron_to_hf": export, "verify_checkpoint": verify}


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def reindex(folder: Path, **changes: str | None) -> None:
    entries = {**weight_map(folder), **changes}
    kept = {name: file for name, file in entries.items() if file is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))


def retensor(folder: Path, name: str, tensor: torch.Tensor | None, *, file_of: str | None = None) -> None:
    """Put a tensor, or with None no tensor, under a name, in the file that the index has for it or for another."""
    path = folder / weight_map(folder)[file_of or name]
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path, metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lose(folder: Path) -> None:
    retensor(folder, DOWN, None)
    reindex(folder, **{DOWN: None})


def quantise(folder: Path, scale: torch.Tensor | None) -> None:
    """Store a weight in FP8, in blocks of 8 x 8, with its scales or without."""
    retensor(folder, DOWN, torch.ones(24, 40).to(torch.float8_e4m3fn))
    reconfigure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    if scale is not None:
        retensor(folder, f"{DOWN}_scale_inv", scale, file_of=DOWN)
        reindex(folder, **{f"{DOWN}_scale_inv": weight_map(folder)[DOWN]})


def cut(folder: Path, size: int, content: bytes | None = None) -> None:
    path = folder / weight_map(folder)[DOWN]
    path.write_bytes((content or path.read_bytes())[:size])


def with_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({"weight": shutil.rmtree}, folder / "pytorch_model.bin")


BAD_SCALE = torch.ones(3, 5)
BAD_SCALE[1, 2] = float("nan")
# what is done to a checkpoint of two layers in many files: what the line says of it
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (lambda f: cut(f, -10), "is not a complete safetensors file"),
    "empty shard": (lambda f: cut(f, 0), "is not a complete safetensors file"),
    "shard of noise": (lambda f: cut(f, 5000, b"\xff" * 5000), "is not a complete safetensors file"),
    "missing shard": (lambda f: (f / weight_map(f)[DOWN]).unlink(), f"is missing; {INDEX} names it"),
    "index to nowhere": (lambda f: reindex(f, **{DOWN: "nowhere.safetensors"}), "nowhere.safetensors is missing"),
    "index to another folder": (lambda f: reindex(f, **{DOWN: "../x.safetensors"}), "must be a file beside the index"),
    "index to the wrong file": (
        lambda f: reindex(f, **{DOWN: weight_map(f)["lm_head.weight"]}),
        f"weight_map.{DOWN} is 'model-",
    ),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "weight_map is None; must be tensor names"),
    "index that is no JSON": (lambda f: (f / INDEX).write_text('{"weight_map'), f"{INDEX} is not readable JSON"),
    "no weights": (lambda f: (f / INDEX).unlink(), "holds neither model.safetensors nor"),
    "wrong shape": (lambda f: retensor(f, DOWN, torch.ones(24, 39)), f"{DOWN} has shape [24, 39]; config.json asks"),
    "missing tensor": (lose, f"tensor {DOWN} is missing; Qwen2ForCausalLM (config.json) needs it"),
    "extra tensor": (
        lambda f: retensor(f, "model.layers.1.mlp.up_proj.bias", torch.ones(40), file_of=DOWN),
        "tensor model.layers.1.mlp.up_proj.bias has no place in this Qwen2ForCausalLM",
    ),
    "tensor in two files": (lambda f: retensor(f, EMBED, torch.ones(131, 24), file_of=DOWN), f"{EMBED} is also in"),
    "whole numbers": (lambda f: retensor(f, DOWN, torch.ones(24, 40).long()), f"{DOWN} is stored as I64; must be"),
    "dtypes that do not go together": (
        lambda f: retensor(f, KEY, torch.ones(8, 24, dtype=torch.float64)),
        f"{KEY} as float64; must be one dtype",
    ),
    "NaN scale": (lambda f: quantise(f, BAD_SCALE), f"{DOWN}_scale_inv is nan at [1, 2]; must be finite numbers > 0"),
    "missing scale": (lambda f: quantise(f, None), f"tensor {DOWN}_scale_inv is missing"),
    "scale of another shape": (lambda f: quantise(f, torch.ones(3, 4)), "has shape [3, 4]; must be [3, 5]"),
    "unknown quantisation": (
        lambda f: reconfigure(f, quantization_config={"quant_method": "gptq"}),
        "quantization_config.quant_method is 'gptq'; must be fp8",
    ),
    "unknown architecture": (lambda f: reconfigure(f, architectures=["Qwen9ForCausalLM"]), "architectures is ['Qwen9"),
    "config of fewer layers": (lambda f: reconfigure(f, num_hidden_layers=1), "has no place in this Qwen2ForCausalLM"),
    "config of another width": (lambda f: reconfigure(f, intermediate_size=48), "config.json asks for ["),
    "config of another head": (lambda f: reconfigure(f, tie_word_embeddings=True), "lm_head.weight differs from"),
    "config of no sense": (
        lambda f: reconfigure(f, num_attention_heads="six"),
        "num_attention_heads is 'six'; must be",
    ),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{,}"), "config.json is not readable JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "more layers than there can be": (lambda f: reconfigure(f, num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "names of no sense": (lambda f: reconfigure(f, architectures=[["Qwen2ForCausalLM"]]), "architectures is [['Qwen2"),
    "tokenizer that leads nowhere": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").symlink_to("nowhere")),
        "tokenizer.json cannot be read: No such file or directory",
    ),
    "index to a pickle": (
        lambda f: (torch.save({DOWN: torch.ones(24, 40)}, f / "x.bin"), reindex(f, **{DOWN: "x.bin"})),
        "x.bin is not a complete safetensors file",
    ),
    "FP8 that is no matrix": (
        lambda f: (quantise(f, torch.ones(3, 5)), retensor(f, NORM, torch.ones(24).to(torch.float8_e4m3fn))),
        f"{NORM} in F8_E4M3 has shape [24]; must be a matrix",
    ),
    "pickle": (with_pickle, "reads its pickles with --allow-pickle"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_checkpoint(folder / "hf", "qwen2", max_shard_size="10KB")
    assert TOOLS["hf_to_megatron"].main([str(folder / "hf"), str(folder / "megatron"), "--file-gb", "0.00001"]) == 0
    return folder


def refused(name: str, *arguments: object, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal; nothing is beside what was there before."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert TOOLS[name].main([*map(str, arguments), str(out)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("megalign: error: ")
    assert sorted(out.parent.iterdir()) == before
    return line


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints(sources: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(sources / "hf", tmp_path / "hf"))
    damage, says = DAMAGE[name]
    damage(folder)
    (tmp_path / "out").mkdir()
    line = refused("hf_to_megatron", folder, "--file-gb", 1e-5, out=tmp_path / "out" / "there", capsys=capsys)
    assert says in line
    assert str(folder) in line


def test_a_pickle_that_is_more_than_tensors(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(sources / "hf", tmp_path / "hf"))
    with_pickle(folder)
    line = refused("hf_to_megatron", folder, "--allow-pickle", out=tmp_path / "out", capsys=capsys)
    assert "pytorch_model.bin is not a pickle of plain tensors" in line


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


def file_of_tensors(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


DAMAGE_BACK: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (lambda f: os.truncate(file_of_tensors(f), 100), "cannot be read"),
    "missing file": (lambda f: file_of_tensors(f).unlink(), "cannot be read"),
    "file of noise": (
        lambda f: file_of_tensors(f).write_bytes(b"\xff" * file_of_tensors(f).stat().st_size),
        "cannot be read",
    ),
    "no index": (lambda f: (f / ".metadata").unlink(), "must be the index of a checkpoint that megalign wrote"),
    "index of noise": (lambda f: (f / ".metadata").write_bytes(b"noise"), "must be the index of a checkpoint"),
    "index that runs code": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(Hostile())), "it names posix.system"),
    "values that run code": (lambda f: torch.save({"about": Hostile()}, f / "common.pt"), "common.pt cannot be read: "),
    "no values": (lambda f: (f / "common.pt").unlink(), "common.pt"),
    "no format": (lambda f: (f / "metadata.json").unlink(), "is not a megalign checkpoint; must be a directory with"),
    "config of another width": (
        lambda f: reconfigure(f / "hf", intermediate_size=48),
        "tensor decoder.layers.mlp.linear_fc1.weight has shape [2, 80, 24]; hf/config.json asks for [2, 96, 24]",
    ),
    "config of another head": (
        lambda f: reconfigure(f / "hf", tie_word_embeddings=True),
        "tensor output_layer.weight has no place in this qwen2 model",
    ),
}


@pytest.mark.parametrize("name", DAMAGE_BACK)
def test_damaged_megatron_checkpoints(
    sources: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(sources / "megatron", tmp_path / "megatron"))
    damage, says = DAMAGE_BACK[name]
    damage(folder)
    (tmp_path / "out").mkdir()
    line = refused("megatron_to_hf", folder, out=tmp_path / "out" / "there", capsys=capsys)
    assert says in line
    assert str(folder) in line


def test_targets_that_are_taken(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    for name, source in (("hf_to_megatron", "hf"), ("megatron_to_hf", "megatron")):
        for taken in ("file", "full"):
            line = refused(name, sources / source, out=tmp_path / taken, capsys=capsys)
            assert f"{taken} exists and is not " in line
    assert (tmp_path / "full" / "notes").read_text() == "kept"


@contextmanager
def no_file_over(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sizes_of_no_sense(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("nan", "inf", "0"):
        line = refused("hf_to_megatron", sources / "hf", "--file-gb", size, out=tmp_path / "out", capsys=capsys)
        assert "--file-gb a number more than 0" in line
    line = refused("megatron_to_hf", sources / "megatron", "--shard-gb", "nan", out=tmp_path / "out", capsys=capsys)
    assert "--shard-gb a number more than 0" in line
    line = refused("hf_to_megatron", "~nobody-of-this-name/x", out=tmp_path / "out", capsys=capsys)
    assert "~nobody-of-this-name/x names no user's home directory" in line


def test_links_are_not_followed(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    (tmp_path / ".out.partial").symlink_to("mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, source in (("hf_to_megatron", "hf"), ("megatron_to_hf", "megatron")):
        assert "out cannot be written: " in refused(name, sources / source, out=tmp_path / "out", capsys=capsys)
        for link in ("link", "dangling"):
            line = refused(name, sources / source, out=tmp_path / link, capsys=capsys)
            assert f"{link} exists and is not a directory" in line
    assert (tmp_path / "mine" / "notes").read_text() == "kept"


def test_a_target_that_comes_up_meanwhile(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def come_up(total: int) -> None:
        out.mkdir()
        (out / "notes").write_text("kept")

    for converting, source in ((hf_to_megatron, str(sources / "hf")), (megatron_to_hf, sources / "megatron")):
        with pytest.raises(
            UserError, match="out (cannot be made: Directory not empty; move it|exists and is not empty)"
        ):
            converting(source, out, ConversionOptions(begin=come_up))  # type: ignore[arg-type]
        assert (out / "notes").read_text() == "kept"
        shutil.rmtree(out)
        converting(source, out)  # type: ignore[arg-type]
        assert not compare(sources / "hf", out).differences
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


def test_a_source_that_changes_meanwhile(sources: Path, tmp_path: Path) -> None:
    for converting, kind in ((hf_to_megatron, "hf"), (megatron_to_hf, "megatron")):
        source = Path(shutil.copytree(sources / kind, tmp_path / kind))
        file = max(source.iterdir(), key=lambda path: path.stat().st_size)
        with pytest.raises(UserError, match=f"{kind} has changed while it was read"):
            touch = ConversionOptions(wrote=lambda count, file=file: os.utime(file, ns=(count, count)))  # type: ignore[misc]
            converting(str(source) if kind == "hf" else source, tmp_path / "out", touch)  # type: ignore[arg-type]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"hf", kind})


def test_values_that_a_dtype_cannot_hold(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(sources / "hf", tmp_path / "hf"))
    large = torch.ones(24, 40, dtype=torch.bfloat16)
    large[3, 3] = 1e5
    retensor(folder, DOWN, large)
    reconfigure(folder, torch_dtype="bfloat16")
    assert TOOLS["hf_to_megatron"].main([str(folder), str(tmp_path / "megatron")]) == 0
    line = refused("megatron_to_hf", tmp_path / "megatron", "--dtype", "float16", out=tmp_path / "out", capsys=capsys)
    assert f"tensor {DOWN} holds 99840, more than torch.float16 can" in line
    assert TOOLS["megatron_to_hf"].main([str(tmp_path / "megatron"), "--dtype", "float32", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_a_damaged_journal_is_none(sources: Path, tmp_path: Path) -> None:
    for content in ("[]", "{", '{"key": 1}', '"x"'):
        partial = tmp_path / ".out.partial"
        (partial / "hf").mkdir(parents=True)
        (partial / "link").symlink_to(sources)
        (partial / ".progress.json").write_text(content)
        hf_to_megatron(str(sources / "hf"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert not compare(sources / "hf", tmp_path / "out").differences
        shutil.rmtree(tmp_path / "out")


def test_writes_that_fail(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file may have 4000 bytes, less than one tensor takes: as on a full disk, writing fails after checks passed.
    for name, source in (("hf_to_megatron", "hf"), ("megatron_to_hf", "megatron")):
        with no_file_over(4000):
            line = refused(name, sources / source, out=tmp_path / "out", capsys=capsys)
            assert TOOLS[name].main([str(sources / source), str(tmp_path / "a" / "b" / "out")]) == 2
        assert "cannot be written: " in line
        assert not (tmp_path / "a").exists()


def test_a_disk_without_space(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # The weights take some 40 kB: refused at once on the smaller disk; the larger has no room for what goes with them.
    for size, says in (("16k", "MB, 0.02 MB are free there"), ("48k", "No space left on device")):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        try:
            for name, source in (("hf_to_megatron", "hf"), ("megatron_to_hf", "megatron")):
                line = refused(name, sources / source, out=disk / "out", capsys=capsys)
                assert "cannot be written: " in line and says in line
                assert "is a disk of its own" in refused(name, sources / source, out=disk, capsys=capsys)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_verify(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = verify.main
    assert compared([str(sources / "hf"), str(sources / "megatron")]) == 0
    assert "equal bit by bit, 0 differ (largest difference 0), 0 only in A, 0 only in B" in capsys.readouterr().out
    folder = Path(shutil.copytree(sources / "hf", tmp_path / "hf"))
    retensor(folder, DOWN, torch.ones(24, 40, dtype=torch.bfloat16))
    assert compared([str(sources / "megatron"), str(folder)]) == 1
    told = capsys.readouterr().out
    assert DOWN in told and "1 differ" in told
    assert compared([str(folder), str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
    retensor(folder, DOWN, torch.full((24, 40), 1.001))
    narrow = Path(shutil.copytree(folder, tmp_path / "bf16"))
    retensor(narrow, DOWN, torch.ones(24, 40).bfloat16())
    assert compared([str(folder), str(narrow)]) == 1
    assert "1 differ (largest difference 0.001)" in capsys.readouterr().out
    odd = {name: torch.arange(3).to(getattr(torch, name)) for name in ("int64", "int8", "bool", "float8_e5m2")}
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        save_file(odd, tmp_path / place / "model.safetensors")
        odd["int8"] = odd["int8"] + 1
    assert compared([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "4 tensors: 3 equal bit by bit, 1 differ (largest difference 1)" in capsys.readouterr().out


@pytest.fixture
def run_dir(sources: Path, tmp_path: Path) -> Path:
    """A run directory with two checkpoints, the newest of which is named by `latest`."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (100, 200):
        shutil.copytree(sources / "megatron", folder / f"step_{step:08d}")
    (folder / "latest").write_text('{"checkpoint": "step_00000200"}')
    return folder.parent


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_00000200"])
def test_a_run_stands_for_its_newest_checkpoint(
    name: str, run_dir: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TOOLS["megatron_to_hf"].main([str(run_dir / name), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    listed = f"{run_dir}/checkpoints/step_00000200, the newest of step_00000100, step_00000200"
    assert (listed in told) is (not name.endswith("200"))
    assert TOOLS["verify_checkpoint"].main([str(tmp_path / "out"), str(run_dir / name)]) == 0


def test_damaged_checkpoints_are_not_exported(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before the newest is taken, also where only contents are spoiled; none is taken in silence."""
    folder, out = run_dir / "checkpoints", tmp_path / "out"
    for step in (100, 200):
        checkpoint = folder / f"step_{step:08d}"
        (checkpoint / "files.json").write_text(json.dumps(describe_files(checkpoint)))
    largest = {path.parent: path for path in sorted(folder.rglob("*.distcp"), key=lambda path: path.stat().st_size)}
    spoiled = largest[folder / "step_00000200"]
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"?")
    assert TOOLS["megatron_to_hf"].main([str(run_dir), str(out)]) == 0
    told = capsys.readouterr().err
    assert f"passed over: {folder}/step_00000200: {spoiled.name} has checksum" in told
    assert f"{folder}/step_00000100, the newest whole one of step_00000100, step_00000200" in told
    line = refused("megatron_to_hf", spoiled.parent, out=tmp_path / "b", capsys=capsys)
    assert f"{spoiled.name} has checksum" in line
    (folder / "step_00000100" / "common.pt").unlink()
    line = refused("megatron_to_hf", run_dir, out=tmp_path / "b", capsys=capsys)
    assert line.count("has checksum") == 1 and "the one before it is damaged too" in line


def test_checkpoints_that_are_not_there(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = run_dir / "checkpoints", tmp_path / "out"
    there = "step_00000100, step_00000200"
    for name in ("checkpoints/step_00000300", "checkpoints/newest"):
        line = refused("megatron_to_hf", run_dir / name, out=out, capsys=capsys)
        assert f"{run_dir / name} is not a checkpoint; must be one that is there: {folder} holds {there}" in line
    for content in ("step_00000200", "{}", '{"checkpoint": "step_00000300"}', '{"checkpoint": []}'):
        (folder / "latest").write_text(content)
        assert TOOLS["megatron_to_hf"].main([str(run_dir), "--dry-run"]) == 0
        told = capsys.readouterr().err
        assert f"{folder / 'latest'} " in told and f"{folder}/step_00000200, the newest of {there}" in told
    (folder / "latest").unlink()
    assert TOOLS["megatron_to_hf"].main([str(run_dir), "--dry-run"]) == 0
    assert f"{folder / 'latest'} is missing; the newest whole checkpoint is step_00000200" in capsys.readouterr().err
    assert "is not a megalign checkpoint" in refused("megatron_to_hf", tmp_path / "none", out=out, capsys=capsys)


@pytest.mark.parametrize("name", ["hf_to_megatron", "megatron_to_hf", "verify_checkpoint"])
def test_command_lines_of_tools(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ([], ["a", "b", "--no-such"], ["a", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            TOOLS[name].main(arguments)
        told = capsys.readouterr()
        assert stop.value.code == 2 and told.out == ""
        assert told.err.startswith("megalign: error: command line: ") and told.err.count("\n") == 1
    assert TOOLS[name].main(["~nobody-has-this-name/x", "b"]) == 2
    assert "~nobody-has-this-name/x names no user's home" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(sources))
    if name == "verify_checkpoint":
        assert TOOLS[name].main(["~/hf", "~/megatron"]) == 0
    else:
        monkeypatch.chdir(tmp_path)
        source = "~/hf" if name == "hf_to_megatron" else "~/megatron"
        assert TOOLS[name].main([source, str(tmp_path / "out")]) == 0
        assert TOOLS[name].main([source, "~/hf"]) == 2 and not list(tmp_path.glob("~*"))


def test_dry_runs_write_nothing(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(sources.rglob("*"))
    assert TOOLS["hf_to_megatron"].main([str(sources / "hf"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "decoder.layers.self_attention.linear_qkv.weight[1]" in told and "by group: queries, key, value" in told
    assert TOOLS["megatron_to_hf"].main([str(sources / "megatron"), "--dry-run"]) == 0
    assert DOWN in capsys.readouterr().out
    assert sorted(sources.rglob("*")) == before


def started(out: Path, source: Path) -> subprocess.Popen[str]:
    """The tool in a process of its own, after it has noted a finished file."""
    command = [sys.executable, str(ROOT / "tools/hf_to_megatron.py"), str(source), str(out), "--file-gb", "0.00001"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    journal = out.with_name(f".{out.name}.partial") / ".progress.json"
    before = journal.stat().st_mtime_ns if journal.exists() else None
    until = time.monotonic() + 60
    while not journal.exists() or journal.stat().st_mtime_ns == before:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    return process


def test_killed_and_stopped_jobs_go_on(tmp_path: Path) -> None:
    source, out = write_family(tmp_path / "hf", "deepseek-v3"), tmp_path / "out"
    process = started(out, source)
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists()
    process = started(out, source)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert told.splitlines()[-1] == "megalign: stopped by a signal; the same command goes on where it was"
    assert not out.exists()
    assert TOOLS["hf_to_megatron"].main([str(source), str(out), "--file-gb", "0.00001"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert not compare(source, out).differences
