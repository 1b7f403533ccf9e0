"""Hugging Face -> Megatron -> Hugging Face through real Megatron models: bitwise, whatever the layout between."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalign.convert.hf.model import read_model
from megalign.convert.megatron.torch_dist import read_index
from megalign.convert.transfer import hf_to_megatron, megatron_to_hf
from megalign.runtime.distributed import process_group
from tests.support.processes import run_python, run_ranks
from tests.support.tiny_checkpoints import CASES, COMPANIONS, write_checkpoint

ROOT = Path(__file__).parents[2]


def same_checkpoint(a: Path, b: Path) -> None:
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
    for name in ("config.json", *COMPANIONS):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def export_at(folder: str, tensor: int, pipeline: int) -> None:
    """Load every case at a layout, take an optimizer step of rate 0 and export it."""
    from megalign.config.layout import Layout
    from megalign.convert import read_model_config
    from megalign.data.group import Response, TokenSequence
    from megalign.data.micro_batch import pack
    from megalign.engines.export import export
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions

    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(tensor, pipeline), timeout_s=60)
        sequence = TokenSequence(0, 0, "response", (1, 2, 3), Response((4, 130)))
        for case, (_, dtype, _, _) in CASES.items():
            source = Path(folder) / case
            model = read_model_config(source)
            options = EngineOptions(dtype=getattr(torch, dtype), device=world.device)
            engine = MegatronEngine(model, groups, options, adamw=AdamW(weight_decay=0.1, clip_norm=1.0))
            engine.load_weights(source)
            engine.backward([pack([sequence], [0])], lambda place, head: (head.logp()[0].sum(), None))
            assert engine.update(0.0) > 0
            export(engine, read_model(source), Path(folder) / f"{case}-{tensor}x{pipeline}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for case in CASES:
        write_checkpoint(folder / case, case)
    return folder


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_a_step_of_rate_zero_gives_the_same_checkpoint_back(checkpoints: Path, tensor: int, pipeline: int) -> None:
    run_ranks(export_at, tensor * pipeline, str(checkpoints), tensor, pipeline)
    for case in CASES:
        same_checkpoint(checkpoints / case, checkpoints / f"{case}-{tensor}x{pipeline}")


def export_that_fails_on_rank_1(folder: str) -> None:
    """Rank 1 may write nothing: all ranks hear of it, none waits for another, and nothing is left."""
    from megalign.config.layout import Layout
    from megalign.convert import read_model_config
    from megalign.engines.export import export
    from megalign.engines.megatron.engine import MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions
    from megalign.schema import UserError

    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(tensor=2), timeout_s=20)
        source = Path(folder) / "qwen2"
        model = read_model_config(source)
        engine = MegatronEngine(model, groups, EngineOptions(dtype=torch.bfloat16, device=world.device), adamw=None)
        engine.load_weights(source)
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="model.safetensors cannot be written: File too large"):
            export(engine, read_model(source), Path(folder) / "failed")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="_extra_state/shard_0_2 cannot be read: .*posix.system"):
            engine.load(Path(folder) / "hostile")


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch ran",)


def make_hostile(folder: Path) -> None:
    """Let one of a checkpoint's small objects, which torch unpickles without looking, run a command."""
    index = read_index(folder)
    place = next(one for one in index.storage_data if one.fqn.endswith("_extra_state/shard_0_2"))
    torch.save([Hostile()], folder / "__9_0.distcp")
    length = (folder / "__9_0.distcp").stat().st_size
    index.storage_data[place] = replace(
        index.storage_data[place], relative_path="__9_0.distcp", offset=0, length=length
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_an_export_that_fails_on_one_rank_fails_on_all(checkpoints: Path) -> None:
    hf_to_megatron(str(checkpoints / "qwen2"), checkpoints / "hostile")
    make_hostile(checkpoints / "hostile")
    run_ranks(export_that_fails_on_rank_1, 2, str(checkpoints))
    assert not Path("ran").exists()
    assert not [path for path in checkpoints.iterdir() if "failed" in path.name]


def test_torch_dist_checkpoints_lead_back_bitwise(checkpoints: Path) -> None:
    for case in CASES:
        hf_to_megatron(str(checkpoints / case), checkpoints / f"{case}-megatron")
        megatron_to_hf(checkpoints / f"{case}-megatron", checkpoints / f"{case}-back")
        same_checkpoint(checkpoints / case, checkpoints / f"{case}-back")
        token = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(checkpoints / name, dtype=torch.float32)(token).logits
            for name in (case, f"{case}-back")
        ]
        assert torch.equal(*logits)


def test_the_tools_convert_and_refuse(checkpoints: Path, tmp_path: Path) -> None:
    def run(tool: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
        return run_python(tmp_path, ROOT / "tools" / tool, *arguments, environment={"PYTHONPATH": str(ROOT)})

    source = checkpoints / "qwen3-bias"
    assert run("hf_to_megatron.py", source, tmp_path / "megatron").returncode == 0
    assert run("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "hf").returncode == 0
    same_checkpoint(source, tmp_path / "hf")
    for tool, arguments, told in [
        ("hf_to_megatron.py", (source, tmp_path / "megatron"), "exists and is not empty"),
        ("megatron_to_hf.py", (source, tmp_path / "other"), "is not a megalign checkpoint"),
    ]:
        refused = run(tool, *arguments)
        assert refused.returncode == 2
        assert told in refused.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "other").exists()
