"""Checkpoints, float64 answers, and one launch for each world size, all made when a test first asks for them."""

import pytest
import torch

from tests.support import deepspeed_cases
from tests.support.loss_cases import KINDS
from tests.support.parity_answers import Answers
from tests.support.parity_cases import FAMILIES, MODELS, run_world, write_checkpoints
from tests.support.parity_layouts import DEFAULT, LAYOUTS
from tests.support.processes import run_ranks


@pytest.fixture(scope="session")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    answers = Answers(folder)
    for name in MODELS:
        write_checkpoints(folder, name)
        answers.score_known(name, ["samples"] if name in FAMILIES else list(KINDS))
    torch.save(answers.known, folder / "known.pt")
    return answers


@pytest.fixture(scope="session")
def results(answers):
    """What the engine gave on a layout; layouts of one world size and suite run in one launch."""

    loaded = {}

    def of_layout(name):
        path = answers.folder / f"{name}.pt"
        if not path.exists():
            processes, default = LAYOUTS[name].num_processes, name in DEFAULT
            together = [
                other
                for other, layout in LAYOUTS.items()
                if layout.num_processes == processes and (other in DEFAULT) == default
            ]
            run_ranks(run_world, processes, answers.folder, together)
        if name not in loaded:
            loaded[name] = torch.load(path)
        return loaded[name]

    return of_layout


@pytest.fixture(scope="session")
def zero_answers(answers):
    """The float64 answers to steps without an auxiliary loss, which only the Megatron engine has."""
    found = Answers(answers.folder, aux=0.0)
    found.known = answers.known
    return found


@pytest.fixture(scope="session")
def zero_results(answers):
    """What the DeepSpeed engine gave in a set-up; those of one number of ranks run in one launch."""

    loaded = {}

    def of_setup(name, *, whole=False):
        path = deepspeed_cases.result_path(answers.folder, name, whole=whole)
        if not path.exists():
            ranks = deepspeed_cases.SETUPS[name].ranks
            together = [
                other
                for other, setup in deepspeed_cases.SETUPS.items()
                if setup.ranks == ranks and (whole or other in deepspeed_cases.DEFAULT)
            ]
            run_ranks(deepspeed_cases.run_world, ranks, answers.folder, together, whole)
        if path not in loaded:
            loaded[path] = torch.load(path)
        return loaded[path]

    return of_setup
