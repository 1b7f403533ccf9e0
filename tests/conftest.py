"""Tests marked `gpu` run only where there is a CUDA device; with `-n` (pytest-xdist) a file's tests stay together."""

from __future__ import annotations

import pytest

# Fixtures of a session that take minutes: all tests that ask for one run in the same worker.
SHARED = {"results", "answers"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("dsession") or hasattr(config, "workerinput"):
        for item in items:
            shared = SHARED.intersection(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("parity" if shared else str(item.path)))
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
