"""Writes an engine's live weights as a Hugging Face directory, every rank its part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalign.convert.hf.export_dir import Owner
from megalign.convert.hf.model import HFModel
from megalign.convert.hf.writer import HFPart, HFWriter, SharedFiles, specs_of
from megalign.convert.transfer import write_adapter
from megalign.engines.protocol import Engine
from megalign.model_config import Lora
from megalign.runtime.ranks import SharedError, gather
from megalign.schema import UserError, reason_of

Result = TypeVar("Result")


class ExportFailed(SharedError):
    """Raised on every rank when an export failed on any; the text is the reason."""


def export(
    engine: Engine,
    source: HFModel,
    folder: Path,
    *,
    owner: Owner | None = None,
    lora: Lora | None = None,
    base: str | None = None,
) -> bool:
    """Write the live weights as a Hugging Face directory, every rank its part; called on every rank.

    source: the model that the weights came from, whose other files are copied. `folder` must be on a file system that
    all ranks see. Adapters are merged, and also written beside in PEFT's format for the model called `base` if PEFT can
    express them; rank 0 returns whether it can. An earlier export of `owner`, or any if that is None, is replaced.
    Raises ExportFailed on every rank if any rank failed.
    """
    main = dist.get_rank() == 0
    writer = _or_fail(lambda: _writer(source, folder, engine.dtype, owner) if main else None)
    try:
        shared = _or_fail(lambda: writer.share() if writer is not None else None)
        written = _write_part(engine, next(files for files in gather(shared) if files is not None))
        return _or_fail(lambda: _close(engine, writer, written, lora, base))
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise


def _writer(source: HFModel, folder: Path, dtype: torch.dtype, owner: Owner | None) -> HFWriter:
    return HFWriter(folder, source=source.folder, specs=specs_of(source, dtype), overwrite=True, owner=owner)


def _or_fail(read: Callable[[], Result]) -> Result:
    """Return `read`'s result, or raise ExportFailed on all ranks where it failed on any, whatever the reason."""
    result, problem = None, None
    try:
        result = read()
    except Exception as error:  # from a disk, a file system, a library that writes files
        problem = str(error) if isinstance(error, UserError) else reason_of(error)
    for reason in gather(problem):
        if reason is not None:
            raise ExportFailed(reason)
    return result  # type: ignore[return-value]


def _close(
    engine: Engine, writer: HFWriter | None, written: list[dict[str, Any]], lora: Lora | None, base: str | None
) -> bool:
    """Add the adapters and publish; ranks other than 0 only take part in gathering."""
    adapters = engine.adapter_tensors() if lora is not None else iter(())
    if writer is None:
        for _ in adapters:
            pass
        return False
    for part in written:
        writer.received(part)
    beside = lora is not None and write_adapter(writer, adapters, lora, base=base)
    writer.close()
    return beside


def _write_part(engine: Engine, shared: SharedFiles) -> list[dict[str, list[tuple[str, int | None]]]]:
    """Write this rank's part of an export and return what each rank wrote.

    Errors are raised on all ranks, after every rank has finished the collective loop.
    """
    part = HFPart(shared)
    problem: Exception | None = None
    # To its end, also after an error: ranks wait for each other in it.
    for name, expert, tensor in engine.own_hf_tensors():
        try:
            if problem is None:
                part.add(name, tensor, expert)
        except (UserError, OSError) as error:
            problem = error

    def finish() -> dict[str, list[tuple[str, int | None]]]:
        try:
            if problem is not None:
                raise problem
            return part.close()
        finally:
            part.abandon()

    return gather(_or_fail(finish))
