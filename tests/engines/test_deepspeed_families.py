"""Models that the tables lack, and odd ones, through the DeepSpeed engine, against transformers in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megalign.data.group import Response, TokenSequence
from megalign.data.packing import Packing
from megalign.engines.loss_inputs import StepBatch
from megalign.engines.step import accumulate
from megalign.losses import choose_loss
from tests.support.auto_checkpoints import AUTO_CASES, write_auto_checkpoint
from tests.support.compare import relative
from tests.support.deepspeed_cases import Setup
from tests.support.families import write_family
from tests.support.processes import run_ranks

PACKED, PADDED = "sequences run as packed rows", "sequences run as padded rows"
# name: how the log says that sequences are run
UNKNOWN = {
    "stablelm": PACKED,
    "olmoe": PACKED,
    "phi": PACKED,  # its head has a bias
    "granitemoe": PACKED,  # scaled logits, tied
    "cohere2": PACKED,  # scaled logits, windows
    "gpt2": PACKED,  # transposed matrices
    "llama4_text": PACKED,
    "recurrent_gemma": PADDED,
    "mamba": PADDED,  # keeps a state over a row
    "bloom": PADDED,  # no position ids: distances along the row are in its attention
}
KNOWN = {"gemma2": PACKED, "granite": PACKED}  # capped logits, scaled ones
LENGTHS = (37, 7, 16, 23, 2)
BUDGET = 40  # tokens of a micro-batch: two ranks have unequal shares
SETUPS = {2: Setup(2, 2), 3: Setup(2, 3, split=True)}


def sequences() -> list[TokenSequence]:
    draw = torch.Generator().manual_seed(5)
    tokens = [torch.randint(131, (length,), generator=draw).tolist() for length in LENGTHS]
    return [
        TokenSequence(group, group, "response", tuple(ids[:1]), Response(tuple(ids[1:])))
        for group, ids in enumerate(tokens)
    ]


def write_answer(folder: Path) -> None:
    """Loss and gradients of SFT in float64; the names are those under which transformers itself saves weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model.double().eval()
    logp = []
    for sequence in sequences():
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response.ids]])
        rows = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        logp.append(rows.gather(1, ids[0, 1:, None]).squeeze(1))
    loss = -torch.cat(logp).mean()
    loss.backward()
    torch.save((float(loss.detach()), [float(one.detach().sum()) for one in logp]), folder / "answer.pt")
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in model.buffers():  # some are saved too
        buffer.zero_()
    model.save_pretrained(folder / "gradients")


def run_cases(folder: Path, names: list[str], stages: list[int]) -> None:
    """The job: one step of every case at every stage; rank 0 leaves what came out in a file."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=300) as world:
        from tests.support.deepspeed_job import job_config, make_engine

        found: dict[str, Any] = {}
        for stage in stages:
            for name in names:
                engine = make_engine(job_config(folder / name, SETUPS[stage]), world)
                batch = StepBatch(sequences(), len(LENGTHS))
                result = accumulate(engine, batch, choose_loss({"name": "sft"}), packing=Packing(BUDGET))
                gradients = {key: tensor.clone() for key, tensor in engine.hf_tensors("grad")}
                found[f"{name} {stage}"] = {
                    "note": engine.note,
                    "loss": result.loss,
                    "policy_S": result.policy_S,
                    "gradients": gradients,
                    "grad_norm": engine.update(0.0),
                }
        if world.is_main:
            torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(Results by case and stage, the folder of the cases)."""
    folder = tmp_path_factory.mktemp("auto")
    for name in (*UNKNOWN, *KNOWN):
        write_case = write_auto_checkpoint if name in UNKNOWN else write_family
        write_case(folder / name, name)
        write_answer(folder / name)
    run_ranks(run_cases, 2, folder, [*UNKNOWN, *KNOWN], [*SETUPS])
    return torch.load(folder / "found.pt"), folder


def check(result: dict[str, Any], folder: Path) -> None:
    """Compare a step with the answer in a case's folder."""
    loss, policy_S = torch.load(folder / "answer.pt")
    assert relative(result["loss"], loss) < 1e-5 and relative(result["policy_S"], policy_S) < 1e-5
    answer = load_file(folder / "gradients" / "model.safetensors")
    assert result["gradients"].keys() == answer.keys()
    whole = float(torch.stack([one.norm() for one in answer.values()]).norm())
    assert relative(result["grad_norm"], whole) < 1e-4
    for key, right in answer.items():
        size = max(float(right.norm()), 1e-3 * whole)  # a bias of keys has almost none
        assert float((result["gradients"][key].double() - right).norm()) < 1e-4 * size, f"{folder.name} {key}"


@pytest.mark.parametrize("stage", SETUPS)
@pytest.mark.parametrize("name", [*UNKNOWN, *KNOWN])
def test_loss_and_gradients_are_those_of_transformers(found, name, stage):
    results, folder = found
    result = results[f"{name} {stage}"]
    check(result, folder / name)
    assert result["note"].startswith({**UNKNOWN, **KNOWN}[name]), result["note"]


@pytest.mark.slow
def test_every_family_at_stage_3(tmp_path):
    names = [name for name in AUTO_CASES if name not in UNKNOWN]
    for name in names:
        write_auto_checkpoint(tmp_path / name, name)
        write_answer(tmp_path / name)
    run_ranks(run_cases, 2, tmp_path, names, [3])
    results = torch.load(tmp_path / "found.pt")
    for name in names:
        check(results[f"{name} 3"], tmp_path / name)
