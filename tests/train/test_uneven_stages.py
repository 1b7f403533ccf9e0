"""Jobs whose pipeline stages hold different kinds of parameters: one has no experts, or no others."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.support.families import write_family
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import metrics, numbers, records, train, write_config, write_lines

GATES = {"lora": {"rank": 2, "alpha": 4.0, "targets": ["gate_proj"]}, "optimizer": {"lr": 1e-2}}
# Two layers, a stage each: (case of `families`, what differs, what the job has beside)
JOBS = {
    "dense first": ("qwen2-moe", {"mlp_only_layers": [0]}, {}),
    "dense last": ("qwen2-moe", {"mlp_only_layers": [1]}, {}),
    "latent, dense first": ("deepseek-v3", {"first_k_dense_replace": 1}, {}),
    # One stage trains nothing but dense adapters, the other nothing but experts'.
    "adapters apart": ("qwen3-moe", {"decoder_sparse_step": 2}, GATES),
    "experts' adapters alone": ("mixtral", {}, GATES),
}
PIPELINE, OTHER = ["parallel.pipeline=2"], ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]


def at_step_2(job, run):
    return f"checkpoint.resume={job / run / 'checkpoints' / 'step_00000002'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every job whole on one rank and on two stages; from either's second step on two stages and on tensor ranks."""
    folder = tmp_path_factory.mktemp("uneven")
    write_lines(folder / "data.jsonl", records("samples"))
    launched = []
    for name, (case, changes, sections) in JOBS.items():
        job = folder / name
        write_family(job / "model", case, num_hidden_layers=2, **changes)
        data = {"data": {"path": str(folder / "data.jsonl")}, "run": {"steps": 4}}
        config = write_config(job, **data, checkpoint={"every": 2, "keep": 9}, **sections)
        assert train(config, f"run.dir={job}/one", f"export.hf_dir={job}/one_hf") == 0
        command = ["train", str(config)]
        launched.append(([*command, *PIPELINE, f"run.dir={job}/two", f"export.hf_dir={job}/two_hf"], 0))
        launched.append(([*command, *PIPELINE, f"run.dir={job}/one_two", at_step_2(job, "one")], 0))
        launched.append(([*command, *PIPELINE, f"run.dir={job}/two_two", at_step_2(job, "two")], 0))
        launched.append(([*command, *OTHER, f"run.dir={job}/two_other", at_step_2(job, "two")], 0))
    on_two_ranks(folder, launched)
    return folder


def assert_same(run, wanted):
    found = numbers(metrics(run))
    assert len(found) == len(wanted) > 0
    for line, right in zip(found, wanted, strict=True):
        assert line["step"] == right["step"]
        assert line["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", JOBS)
def test_stages_give_the_numbers_of_one_rank(name, folder):
    job = folder / name
    assert_same(job / "two", numbers(metrics(job / "one")))
    mine, theirs = (load_file(job / run / "model.safetensors") for run in ("two_hf", "one_hf"))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (mine[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("run", ["one_two", "two_two", "two_other"])
def test_what_they_save_goes_on(name, run, folder):
    assert_same(folder / name / run, numbers(metrics(folder / name / "one"))[2:])


@pytest.mark.parametrize("name", JOBS)
def test_and_on_one_rank(name, folder):
    job = folder / name
    assert train(job / "job.yaml", f"run.dir={job}/back", at_step_2(job, "two")) == 0
    assert_same(job / "back", numbers(metrics(job / "one"))[2:])


def test_what_is_saved_before_the_first_update_goes_on(folder, tmp_path):
    """A gradient that is not finite moves nothing, so that the optimizer has no moments yet."""
    job = folder / "dense last"
    command = ["run.steps=2", "checkpoint.every=1", "run.max_bad_steps=2", "loss.beta=1e38"]
    assert train(job / "job.yaml", *command, f"run.dir={tmp_path}/whole") == 0
    resume = f"checkpoint.resume={tmp_path}/whole/checkpoints/step_00000001"
    assert train(job / "job.yaml", *command, f"run.dir={tmp_path}/on", resume) == 0
    whole, (last,) = (metrics(tmp_path / run) for run in ("whole", "on"))
    assert [line["grad_norm"] for line in whole] == [None, None]
    assert last["loss"] == pytest.approx(whole[1]["loss"], rel=1e-6)
