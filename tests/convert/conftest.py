"""Each tiny checkpoint is written once."""

from pathlib import Path

import pytest

from tests.support.tiny_checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Each case once, as a read-only directory."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def checkpoint(case: str) -> Path:
        if case not in made:
            made[case] = write_checkpoint(root / case, case)
        return made[case]

    return checkpoint
