"""Real faults of a job's directories, inputs and layout, each of which the doctor finds and names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megalign.doctor.disk import PREFIX
from tests.support import mounts
from tests.support.doctor_visits import Rank, Visit, doctor
from tests.support.tiny_jobs import records, round_sections, write_config, write_lines, write_model

needs_mounts = pytest.mark.skipif(bool(mounts.missing()), reason=mounts.missing() or "file systems can be mounted")
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192}


def failed(visit: Visit) -> dict[str, str]:
    """{check: line} of what failed."""
    return {each["check"]: each["found"] for each in visit.report["findings"] if each["state"] == "fail"}


def warned(visit: Visit) -> dict[str, str]:
    """{check: line} of what is doubtful."""
    return {each["check"]: each["found"] for each in visit.report["findings"] if each["state"] == "warn"}


def probes(folder: Path) -> list[Path]:
    """What doctors have left below a folder."""
    return list(folder.rglob(f"{PREFIX}*"))


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> tuple[Visit, Path]:
    """A visit of two ranks of which the second has another model and prompts, no reward, and a disk of its own."""
    folder = tmp_path_factory.mktemp("rounds")
    write_model(folder / "model", tokenizer=True)
    (folder / "runs").mkdir()
    (folder / "rewards").mkdir()
    (folder / "rewards/own_reward.py").write_text("def score(prompt, response, record): return 1.0\n")
    sections = round_sections(folder, reward="own_reward:score")
    sections["run"] = {"steps": None, "dir": str(folder / "runs/first")}
    sections["reference"] = {"source": str(shutil.copytree(folder / "model", folder / "reference"))}
    config = write_config(folder, **sections)
    (folder / "prompts.other").write_text((folder / "prompts.jsonl").read_text().replace("0+0=", "1+0="))
    hf = json.loads((folder / "model/config.json").read_text())
    (folder / "config.other").write_text(json.dumps({**hf, "rope_theta": 7.0}))
    alone = mounts.alone_with(
        ["--bind", folder / "prompts.other", folder / "prompts.jsonl"],
        ["--bind", folder / "config.other", folder / "model/config.json"],
        ["-t", "tmpfs", "tmpfs", folder / "runs"],
    )
    ranks = [Rank(environment={"PYTHONPATH": str(folder / "rewards")}), Rank(alone)]
    visit = doctor(str(config), "parallel.tensor=4", "watchdog.timeout_s=50", ranks=ranks)
    assert not probes(folder)
    return visit, folder


@needs_mounts
@pytest.mark.parametrize(
    ("check", "words"),
    [
        (
            "run.dir shared",
            ["not shared: rank 1 on ", "does not see what rank 0 writes in {folder}/runs: No such file"],
        ),
        ("rollout.path", ["{folder}/prompts.jsonl: rank 1 on ", "another one than rank 0: prompts.jsonl has other"]),
        ("model.path", ["{folder}/model: rank 1 on ", "another one than rank 0: config.json has "]),
        ("rollout.reward", ["module 'own_reward' cannot be imported", "(rank 1 on "]),
        ("layout", ["parallel.tensor x parallel.pipeline x parallel.context is 4 x 1 x 1 = 4: must divide", "ranks 2"]),
    ],
)
def test_a_rank_that_has_other_files(rounds, check, words):
    visit, folder = rounds
    found = failed(visit)
    assert visit.codes == [2, 2] and check in found, found
    for word in words:
        assert word.format(folder=folder) in found[check]


@needs_mounts
def test_what_all_ranks_share_is_well(rounds):
    found = failed(rounds[0])
    assert not {"reference.source", "configuration", "run.dir writable", "run.dir file system"} & found.keys()
    assert "training's checks" not in found  # its line is that of the layout


@pytest.fixture(scope="module")
def too_large(tmp_path_factory) -> tuple[Visit, Path]:
    """A visit of one rank with a model of 70B without weights, a run directory of 64 kB, and an export without room."""
    folder = tmp_path_factory.mktemp("large")
    write_model(folder / "model")
    hf = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**hf, **LLAMA_70B}))
    (folder / "model/model.safetensors").unlink()
    write_lines(folder / "data.jsonl", records("samples"))
    run = {"dir": str(folder / "small/run"), "steps": 9, "dtype": "bf16"}
    export = {"hf_dir": str(folder / "none/hf")}
    config = write_config(folder, run=run, export=export, checkpoint={"every": 1})
    with mounts.mounted(folder / "small", "size=64k"), mounts.mounted(folder / "none", "size=64k,nr_inodes=1"):
        left = folder / "small" / f"{PREFIX}0123"
        left.mkdir()
        visit = doctor(str(config))
        assert probes(folder) == [left]  # it is young: another doctor may be using it
        assert [path.name for path in (folder / "small").iterdir()] == [left.name]
    return visit, folder


@needs_mounts
def test_a_disk_that_is_too_small(too_large):
    visit, folder = too_large
    found = failed(visit)
    # 70.55e9 weights in bf16, their copies and moments in fp32
    assert "for 3 checkpoints of 988 GB; " in found["run.dir space"], found
    assert f"are free in {folder}/small" in found["run.dir space"]
    assert warned(visit)["run.dir file system"].startswith("tmpfs: ")


@needs_mounts
def test_a_disk_without_a_free_file(too_large):
    assert "No space left on device (rank 0 on " in failed(too_large[0])["export.hf_dir writable"]


@needs_mounts
def test_memory_that_is_too_small(too_large):
    found = failed(too_large[0])["memory"]
    assert "70,553,706,496 parameters a rank, 1.27 TB with gradients and optimizer" in found
    assert "of host memory: 1.27 TB are held at all times" in found


@needs_mounts
def test_a_model_without_weights(too_large):
    found = failed(too_large[0])
    assert "holds neither model.safetensors nor model.safetensors.index.json" in found["training's checks"]


@needs_mounts
def test_read_only_directory_and_unreadable_data_of_one_rank(tmp_path):
    """The export's directory is relative, so another one for a rank that starts elsewhere."""
    write_model(tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name in ("data", "runs/run", "here", "there"):
        (tmp_path / name).mkdir(parents=True)
    write_lines(tmp_path / "data/data.jsonl", records("samples"))
    run = {"dir": str(tmp_path / "runs/run"), "steps": 1}
    export = {"hf_dir": "exports/hf"}
    config = write_config(tmp_path, run=run, export=export, data={"path": str(tmp_path / "data/data.jsonl")})
    runs = tmp_path / "runs"
    alone = mounts.alone_with(
        ["--bind", runs, runs], ["-o", "remount,bind,ro", runs], ["-t", "tmpfs", "tmpfs", tmp_path / "data"]
    )
    ranks = [Rank(folder=tmp_path / "here"), Rank(alone, folder=tmp_path / "there")]
    visit = doctor(str(config), "parallel.tensor=4", ranks=ranks)
    found = failed(visit)
    assert visit.codes == [2, 2] and not probes(tmp_path)
    assert not [*(runs / "run").iterdir(), *(tmp_path / "here").iterdir()]
    assert f"{runs}/run: Read-only file system (rank 1 on " in found["run.dir writable"], found
    assert "data.jsonl: no such file or directory (rank 1 on " in found["data.path"]
    assert "model.safetensors is not a complete safetensors file" in found["training's checks"]
    assert f"does not see what rank 0 writes in {tmp_path}/there: No such file" in found["export.hf_dir shared"]
    assert "run.dir shared" not in found
