"""Checkpoints, float64 answers, and one launch for each world size, all made when a test first asks for them."""

import pytest
import torch
from answers import Answers
from cases import DEFAULT, FAMILIES, KINDS, LAYOUTS, MODELS, run_world, write_checkpoints

from megalign.runtime.distributed import spawn


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
            spawn(run_world, processes, answers.folder, together)
        if name not in loaded:
            loaded[name] = torch.load(path)
        return loaded[name]

    return of_layout
