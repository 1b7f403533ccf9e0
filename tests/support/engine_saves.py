"""Saves of an engine alone, without the checkpoint of a run around them."""

from __future__ import annotations

import torch.distributed as dist

from megalign.engines.saving import Saving
from megalign.runtime.ranks import gather_on_main, on_every_rank


def complete(saving: Saving) -> None:
    """Write a prepared save on all ranks and finish it; SharedError on all of them where one cannot write."""
    abouts = [written.about for written in gather_on_main(on_every_rank(saving.write))]
    on_every_rank((lambda: saving.finish(abouts)) if dist.get_rank() == 0 else lambda: None)
