"""Reads rotary parameters from a config.json of transformers 5 (`rope_parameters`) or older versions."""

from __future__ import annotations

import math

from megalign.convert.hf.config_json import ConfigFile
from megalign.model_config import LinearScaling, Llama3Scaling, LongScaling, Rope, RopeScaling, YarnScaling
from megalign.schema import UserError

ORIGINAL = "original_max_position_embeddings"
KINDS = ("default", "linear", "llama3", "longrope", "yarn")


def rope_section(hf: ConfigFile) -> ConfigFile | None:
    """Return the object with the rotary parameters: the first non-empty one, as in transformers; None: no such."""
    for key in ("rope_scaling", "rope_parameters"):
        if hf.value(key):
            return hf.section(key)
    return None


def read_rope(
    hf: ConfigFile,
    section: ConfigFile | None,
    *,
    head_dim: int,
    interleaved: bool = False,
    partial: bool = False,
    theta_key: str = "rope_theta",
) -> Rope:
    """Read a rotary embedding from `section`; parameters missing there are read from `hf`, the base as `theta_key`.

    partial: whether the family may rotate only a part of each head's dimensions.
    """
    if section is not None and any(isinstance(value, dict) for value in section.fields.values()):
        hf.refuse(
            section.prefix.rstrip("."), "parameters by layer type are not supported; must be one set for all layers"
        )
    theta = hf.number(theta_key) if section is None or section.value("rope_theta") is None else None
    theta = section.number("rope_theta") if theta is None and section is not None else theta
    assert theta is not None
    holder = hf if section is None or section.value("partial_rotary_factor") is None else section
    share = 1.0 if holder.value("partial_rotary_factor") is None else holder.number("partial_rotary_factor")
    if share != 1 and not partial:
        holder.refuse("partial_rotary_factor", "must be 1.0 (all of a head is rotated)")
    dim = int(head_dim * share)
    if dim % 2 or not 0 < dim <= head_dim:
        raise UserError(
            f"{hf.path}: {dim} of head_dim {head_dim} dimensions rotate (partial_rotary_factor {share:g}); "
            "rotary positions need an even number of them"
        )
    return Rope(theta, dim, None if section is None else _scaling(hf, section, dim), interleaved)


def _scaling(hf: ConfigFile, section: ConfigFile, dim: int) -> RopeScaling | None:
    kind_key = "rope_type" if "rope_type" in section.fields else "type"
    kind = section.value(kind_key)
    if kind in (None, "default"):
        return None
    if kind in ("su", "yarn") and hf.value("model_type") == "phi3":  # Phi-3's older names of LongRoPE
        kind = "longrope"
    if kind not in KINDS:
        section.refuse(kind_key, f"must be one of {', '.join(KINDS)}")
    if kind == "linear":
        return LinearScaling(section.number("factor"))
    holder = hf if hf.value(ORIGINAL) is not None or section.value(ORIGINAL) is None else section
    original = holder.whole(ORIGINAL if holder.value(ORIGINAL) is not None else "max_position_embeddings")
    if kind == "llama3":
        factor = section.number("factor")
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if high <= low:
            section.refuse("high_freq_factor", f"must be above low_freq_factor, {low}")
        return Llama3Scaling(factor, low, high, original)
    given = section.value("factor") is not None
    factor = section.number("factor") if given else hf.whole("max_position_embeddings") / original
    if kind == "yarn":
        return _yarn(section, factor, original)
    short, long = (_factors(section, key, dim // 2) for key in ("short_factor", "long_factor"))
    sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongScaling(short, long, original, _given(section, "attention_factor", sharper))


def _yarn(section: ConfigFile, factor: float, original: int) -> YarnScaling:
    """Read YaRN's parameters, with transformers' defaults for missing ones."""
    sharper = yarn_mscale(factor, 1.0)
    if section.value("mscale") and section.value("mscale_all_dim"):
        sharper = yarn_mscale(factor, section.number("mscale")) / yarn_mscale(factor, section.number("mscale_all_dim"))
    return YarnScaling(
        factor,
        original,
        beta_fast=_given(section, "beta_fast", 32.0),
        beta_slow=_given(section, "beta_slow", 1.0),
        truncate=True if section.value("truncate") is None else section.flag("truncate"),
        attention_factor=_given(section, "attention_factor", sharper),
    )


def yarn_mscale(factor: float, weight: float) -> float:
    """Compute the factor on attention logits for a context `factor` times as long (YaRN, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _given(section: ConfigFile, key: str, otherwise: float) -> float:
    return otherwise if section.value(key) is None else section.number(key)


def _factors(section: ConfigFile, key: str, count: int) -> tuple[float, ...]:
    values = section.value(key)
    good = isinstance(values, list) and all(type(value) in (int, float) and value > 0 for value in values)
    if not good or len(values) != count:
        section.refuse(key, f"must be a list of {count} numbers > 0, one for each pair of rotary dimensions")
    return tuple(float(value) for value in values)
