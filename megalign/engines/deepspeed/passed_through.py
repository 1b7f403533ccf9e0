"""Checks `engine.deepspeed_config`: every name by megalign's list, every value by DeepSpeed's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from pydantic import PositiveInt, ValidationError

from megalign.config.deepspeed_keys import DEEPSPEED_OWNED, DEEPSPEED_SETTINGS, SECTIONS, ZERO, entries, may_pass
from megalign.engines.deepspeed.library import deepspeed
from megalign.schema import Strict, UserError, allowed_keys, first_problem, shorten

WHERE = "engine.deepspeed_config"


class AioSettings(Strict):
    """Declares DeepSpeed's section `aio`, of which it checks no value: how files on NVMe are read and written."""

    block_size: PositiveInt = 1 << 20
    """Bytes of a request."""
    queue_depth: PositiveInt = 8
    """Number of requests on their way at a time."""
    intra_op_parallelism: PositiveInt = 1
    """Number of threads of a transfer."""
    single_submit: bool = False
    """Whether requests are submitted one by one."""
    overlap_events: bool = True
    """Whether requests are submitted while others end."""
    use_gds: bool = False
    """Whether data go from NVMe to the GPU directly."""


def check_passed_through(settings: Mapping[str, Any], stage: int) -> None:
    """Refuse settings that DeepSpeed lacks or must not get, and values of a wrong kind; megalign's own were before."""
    if not settings:
        return
    _refuse_dots(settings)
    for key, value in entries(settings):
        if not may_pass(key):
            raise UserError(f"{WHERE}.{key} is not a known key{_allowed(key)}")
        if key in SECTIONS and not isinstance(value, Mapping):
            raise UserError(f"{WHERE}.{key} is {shorten(value)}: must be a section of keys")
        if value == "auto":
            raise UserError(f"{WHERE}.{key} is 'auto': only transformers' Trainer fills that in; must be a value")
    deepspeed()
    zero = import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    try:
        parsed = zero(**{**settings.get(ZERO, {}), "stage": stage})
    except ValidationError as error:
        raise UserError(f"{WHERE}.{ZERO}.{first_problem(error)}") from None
    if stage < 3 and parsed.allgather_bucket_size % 2:
        size = parsed.allgather_bucket_size
        raise UserError(f"{WHERE}.{ZERO}.allgather_bucket_size is {size}: must be even, as stages 1 and 2 need it")
    try:
        aio = AioSettings.model_validate(settings.get("aio", {}))
    except ValidationError as error:
        raise UserError(f"{WHERE}.aio.{first_problem(error)}") from None
    if aio.use_gds and not torch.cuda.is_available():
        raise UserError(f"{WHERE}.aio.use_gds is True: there is no CUDA device here; must be false")


def _refuse_dots(settings: Mapping[str, Any]) -> None:
    """Refuse a dotted name as one key, which DeepSpeed would pass over; overrides are nested by now."""
    for key, value in settings.items():
        if "." in key:
            first, _, rest = key.partition(".")
            raise UserError(f"{WHERE}: {key!r} is one key: must be nested, as in {{{first}: {{{rest}: ...}}}}")
        if isinstance(value, Mapping):
            _refuse_dots(value)


def _allowed(key: str) -> str:
    """Return the end of an error about an unknown setting: a place where it belongs, or its known neighbours."""
    section, _, last = key.rpartition(".")
    elsewhere = [known for known in DEEPSPEED_SETTINGS if known.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    owned = [known for known in DEEPSPEED_OWNED if known.rpartition(".")[2] == last]
    if owned:
        return f"; {owned[0]} must be left out too: {DEEPSPEED_OWNED[owned[0]]}"
    known = {name for name in (*DEEPSPEED_SETTINGS, *SECTIONS) if name.rpartition(".")[0] == section and name}
    return allowed_keys(last, [name.rpartition(".")[2] for name in known])
