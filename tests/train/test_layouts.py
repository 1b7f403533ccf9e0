"""Jobs with virtual pipelines, context ranks, experts and adapters: whole, and saved in one layout for another."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalign.convert.transfer import megatron_to_hf
from tests.support.compare import assert_close_metrics
from tests.support.processes import on_two_ranks
from tests.support.tiny_jobs import (
    VOCAB_SIZE,
    hf_logps,
    metrics,
    numbers,
    read_lines,
    records,
    round_sections,
    save_drawn,
    train,
    training_numbers,
    write_config,
    write_lines,
    write_model,
    write_tokenizer,
)

STEPS = 4
LAYOUTS = {
    "cp2": ["parallel.context=2"],
    "vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "tp2+sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "ep2": ["parallel.expert=2"],
}
LORA = {"rank": 3, "alpha": 6.0}
JOBS = {
    "dense": ("deep", {}, ("cp2", "vpp2")),
    "lora": ("deep", {"lora": LORA, "optimizer": {"lr": 1e-2}}, ("tp2+sp", "vpp2")),
    "experts": ("moe", {"model": {"aux_loss_coefficient": 0.01}}, ("ep2", "tp2+sp")),
    "rounds": (
        "moe",
        {"lora": LORA, "loss": {"name": "grpo", "beta": 0.3}, "reference": {"source": "initial"}},
        ("ep2",),
    ),
}
CASES = [(name, layout) for name, (_, _, layouts) in JOBS.items() for layout in layouts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every job on one rank here, and on two ranks in one launch: whole, and from the one rank's second step."""
    folder = tmp_path_factory.mktemp("layouts")
    write_model(folder / "deep", num_hidden_layers=4)
    write_experts(folder / "moe")
    write_lines(folder / "data.jsonl", records("samples"))
    launched = []
    for name, (model, changes, layouts) in JOBS.items():
        job = folder / name
        job.mkdir()
        if name == "rounds":
            sections = round_sections(job)
        else:
            sections = {"data": {"path": str(folder / "data.jsonl")}, "run": {"steps": STEPS}}
        sections["checkpoint"] = {"every": 2, "keep": 9}
        for key, value in changes.items():
            sections[key] = {**sections.get(key, {}), **value}
        sections["model"] = {"path": str(folder / model), **sections.get("model", {})}
        config = write_config(job, **sections)
        one = f"run.dir={job}/one"
        assert train(config, one, f"export.hf_dir={job}/hf") == 0
        for layout in layouts:
            command = ["train", str(config), *LAYOUTS[layout]]
            # The one rank evaluates nothing: what is evaluated beside the steps must not change them.
            held_out = job / "prompts.jsonl" if name == "rounds" else folder / "data.jsonl"
            outputs = [f"run.dir={job}/{layout}", f"export.hf_dir={job}/{layout}_hf"]
            launched.append(([*command, *outputs, f"eval.path={held_out}", "eval.every=3"], 0))
            launched.append(([*command, f"run.dir={job}/{layout}_on", f"checkpoint.resume={at_step_2(job, 'one')}"], 0))
    (folder / "told").write_text(on_two_ranks(folder, launched))
    return folder


def at_step_2(job, run):
    return job / run / "checkpoints" / "step_00000002"


def write_experts(folder):
    """A Qwen2-MoE of four layers, the second of them dense, with a tokenizer."""
    torch.manual_seed(3)
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
    )
    save_drawn(transformers.Qwen2MoeForCausalLM(config), folder)
    write_tokenizer(folder)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_two_ranks_give_the_numbers_of_one(name, layout, folder):
    assert_close_metrics(*(training_numbers(metrics(folder / name / run)) for run in (layout, "one")))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_two_ranks_evaluate_what_one_trains_on(name, layout, folder):
    lines = metrics(folder / name / layout)
    key = "eval_reward" if name == "rounds" else "eval_loss"
    assert [line["step"] for line in lines if key in line] == [0, 3, 4]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_checkpoint_goes_on_in_another_layout(name, layout, folder):
    one = numbers(metrics(folder / name / "one"))
    assert_close_metrics(numbers(metrics(folder / name / f"{layout}_on")), one[2:])


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_and_comes_back(name, layout, folder):
    """What two ranks saved goes on upon one."""
    job, run = folder / name, folder / name / f"back_{layout}"
    assert train(job / "job.yaml", f"run.dir={run}", f"checkpoint.resume={at_step_2(job, layout)}") == 0
    assert_close_metrics(numbers(metrics(run)), numbers(metrics(job / "one"))[2:])


def test_exports_agree(folder):
    for name, layout in CASES:
        one, two = (load_file(folder / name / run / "model.safetensors") for run in ("hf", f"{layout}_hf"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            assert (two[key] - tensor).norm() <= 1e-5 * tensor.norm(), f"{name} {layout} {key}"


def test_the_auxiliary_loss_is_reported(folder):
    lines = metrics(folder / "experts" / "one")
    # A layer whose experts share all tokens equally has 1; three layers have experts.
    assert all(0.03 <= line["aux_loss"] < 0.06 for line in lines)
    assert all("aux_loss" not in line for line in metrics(folder / "dense" / "one"))


def test_adapters_go_to_peft(folder):
    """The export's weights have the adapter merged; the adapter beside them makes the same of the base in `peft`."""
    import peft

    job, prompt, response = folder / "lora", [5, 6, 7], [8, 9, 10, 11]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "deep", dtype=torch.float32)
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        before = base(ids).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, job / "hf" / "adapter")(ids).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(job / "hf", dtype=torch.float32)(ids).logits
    assert (adapted - merged).abs().max() < 1e-5 * merged.abs().max()
    assert (adapted - before).abs().max() > 0.1
    assert hf_logps(job / "hf", prompt, response).sum() != hf_logps(folder / "deep", prompt, response).sum()
    files = {path.name for path in (job / "hf" / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    about = json.loads((job / "hf" / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["base_model_name_or_path"]) == (LORA["rank"], str(folder / "deep"))


def test_a_checkpoint_with_adapters_becomes_the_export(folder, tmp_path):
    job = folder / "lora"
    megatron_to_hf(job / "one" / "checkpoints" / "step_00000004", tmp_path / "hf")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        mine, theirs = load_file(tmp_path / "hf" / name), load_file(job / "hf" / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    configs = [(out / "adapter" / "adapter_config.json").read_text() for out in (tmp_path / "hf", job / "hf")]
    assert configs[0] == configs[1]


def test_an_export_with_adapters_is_replaced(folder, tmp_path):
    job, target = folder / "lora", tmp_path / "hf"
    command = [f"run.dir={tmp_path}/run", f"export.hf_dir={target}", "checkpoint.every=1"]
    one, two = {}, {}
    for steps, found in ((1, one), (2, two)):
        assert train(job / "job.yaml", *command, f"run.steps={steps}") == 0
        found.update(load_file(target / "adapter" / "adapter_model.safetensors"))
    assert any(not torch.equal(one[key], tensor) for key, tensor in two.items())
    (target / "adapter" / "notes.txt").write_text("mine")
    assert train(job / "job.yaml", *command, "checkpoint.resume=never") == 2


def test_adapters_of_single_experts_are_merged_only(folder):
    assert not (folder / "rounds" / "hf" / "adapter").exists()
    assert "PEFT has no place for single experts' adapters" in (folder / "told").read_text()


def test_the_reference_is_the_base_without_adapters(folder, tmp_path):
    """As a second engine with the initial weights scores it, to the bit."""
    job = folder / "rounds"
    own = f"reference.source={folder / 'moe'}"
    assert train(job / "job.yaml", f"run.dir={tmp_path}/run", own) == 0
    lines, others = (numbers(metrics(run)) for run in (tmp_path / "run", job / "one"))
    assert [line["kl"] for line in lines] == [line["kl"] for line in others]
    assert any(line["kl"] > 1e-4 for line in lines[1:])


def test_a_converted_checkpoint_may_get_adapters(folder, tmp_path):
    from megalign.convert.transfer import hf_to_megatron

    hf_to_megatron(str(folder / "deep"), tmp_path / "base")
    run = tmp_path / "run"
    assert train(folder / "lora" / "job.yaml", f"run.dir={run}", f"checkpoint.resume={tmp_path / 'base'}") == 0
    assert numbers(metrics(run)) == numbers(metrics(folder / "lora" / "one"))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("lora", ["lora.rank=4"], "was trained with rank 3, alpha 6, targets q_proj"),
        ("lora", ["lora=null"], "was trained with rank 3"),
        ("dense", ["lora={rank: 3, alpha: 6}"], "was trained without adapters"),
    ],
)
def test_other_adapters_than_the_checkpoints_are_refused(name, changes, told, folder, tmp_path, capsys):
    job = folder / name
    resume = f"checkpoint.resume={at_step_2(job, 'one')}"
    assert train(job / "job.yaml", f"run.dir={tmp_path}/run", resume, *changes) == 2
    assert told in capsys.readouterr().err


def test_dumped_scores_are_the_exports(folder, tmp_path):
    """What the engine trained last is what transformers computes from the export of the step before."""
    job = folder / "lora"
    dump = ["run.dump_steps=[1]", f"run.dir={tmp_path}/run", "run.steps=1", f"model.path={job / 'hf'}", "lora=null"]
    assert train(job / "job.yaml", *dump) == 0
    for line in read_lines(tmp_path / "run" / "steps" / "step_1.jsonl")[:3]:
        logp = hf_logps(job / "hf", line["prompt_ids"], line["response_ids"]).sum()
        assert line["logp"] == pytest.approx(float(logp), rel=1e-5)
