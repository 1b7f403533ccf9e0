"""Opens a checkpoint of either engine as Hugging Face tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from megalign.convert.megatron.reader import MegatronSource
from megalign.convert.zero.files import FOLDER, INDEX
from megalign.convert.zero.model import ZeroModel

SavedModel: TypeAlias = MegatronSource | ZeroModel


def open_saved(folder: Path) -> SavedModel:
    """Open a checkpoint of a run or of a conversion; UserError where it is none, or is damaged."""
    return ZeroModel(folder) if (folder / FOLDER / INDEX).is_file() else MegatronSource(folder)
