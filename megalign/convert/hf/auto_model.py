"""Builds any decoder of transformers on the meta device, without what would make its passes differ."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megalign.convert.hf.config import is_noise, refuse_compressed
from megalign.convert.hf.config_json import read_json
from megalign.schema import UserError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# Fields by which a model computes something else in training than in scoring, and the value that prevents it.
EXACT = {"use_cache": False, "output_router_logits": False, "rescale_every": 0, "altup_coef_clip": None}
# Modules that draw experts at random in training; as in scoring, they take those with the largest scores.
SAMPLING = ("PhimoeTopKRouter",)
# Model types that are no decoders of one text, or draw random numbers that nothing switches off.
REFUSED = {
    "big_bird": "attends to blocks at random",
    "reformer": "hashes positions at random",
    "xlnet": "attends to later positions",
}
ENCODERS = ("megatron-bert", "rembert", "roformer")  # where `is_decoder` is false; others say so in their attention


def auto_config(folder: Path) -> PreTrainedConfig:
    """Read a directory's config.json as transformers does, without remote code, and switch its noise off."""
    # Imported here: transformers takes seconds, and not every job needs it.
    import transformers

    path = folder / "config.json"
    raw = read_json(path)
    refuse_compressed(path, raw)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each of some hundred configuration classes raises its own
        raise _cannot_build(path, raw, error) from None
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{path}: is_encoder_decoder is True; must be a model without an encoder")
    if config.model_type in REFUSED:
        raise UserError(
            f"{path}: model_type is {config.model_type!r}, which {REFUSED[config.model_type]}; must be another"
        )
    # The stored tensors are dequantised when read.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _quieten(config.model_type, config)
    return config


def meta_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the model of a directory on the meta device, without noise.

    Tensors that the model's class keeps in another dtype (e.g. routing biases in fp32) have that one. Raises UserError
    for a model that transformers cannot build without remote code, or that is no decoder.
    """
    import transformers
    from transformers.initialization import meta_device_safe_creation_ops

    config = auto_config(folder)
    try:
        with torch.device("meta"), meta_device_safe_creation_ops(), warnings.catch_warnings(action="ignore"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # each of some hundred model classes raises its own
        raise _cannot_build(folder / "config.json", read_json(folder / "config.json"), error) from None
    _refuse_encoder(folder / "config.json", model)
    keep_fp32(model, dtype)
    switch_off_noise(model)
    return model


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal model that computes its last hidden states.

    Most classes name it by their prefix; Llama 4's has that of the model with pictures.
    """
    import transformers

    if model.base_model is not model:
        return model.base_model
    return next(part for part in model.children() if isinstance(part, transformers.PreTrainedModel))


def _refuse_encoder(path: Path, model: PreTrainedModel) -> None:
    """Raise UserError for a model whose positions see later ones."""
    config = model.config
    causal = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    encoder = config.model_type in ENCODERS and not config.is_decoder
    field = "causal" if getattr(config, "causal", True) is False else "is_decoder"
    if causal == {False} or encoder or field == "causal":
        raise UserError(
            f"{path}: {field} is {getattr(config, field, None)!r}: {type(model).__name__} attends to later positions; "
            "must be true"
        )


def _cannot_build(path: Path, raw: Mapping[str, Any], error: Exception) -> UserError:
    import transformers

    kind = f"model_type is {raw.get('model_type')!r}"
    wanted = f"must be a causal language model of transformers {transformers.__version__}, without remote code"
    if raw.get("auto_map"):
        return UserError(f"{path}: {kind} with code of its own (auto_map); {wanted}")
    return UserError(f"{path}: {kind}, which cannot be built ({reason_of(error)}); {wanted}")


def keep_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn the tensors that the model's class keeps in fp32 under a half-precision dtype to fp32, as loading does."""
    patterns = model._get_dtype_plan(dtype)
    if not patterns:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if kept.search(name):
            tensor.data = tensor.data.float()


def switch_off_noise(model: PreTrainedModel) -> None:
    """Set all dropout and router noise to 0, and what else makes passes differ or gradients incomplete.

    Padding rows of embeddings get gradients, routers draw no experts and return no logits for a loss of the model's
    own, and no cache of keys and values is kept. Holds in training mode, too.
    """
    kind = model.config.model_type
    _quieten(kind, model.config)
    for module in model.modules():
        if type(module).__name__ in SAMPLING:
            module.register_forward_pre_hook(_as_in_scoring)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        for name, value in list(vars(module).items()):
            if is_noise(kind, name, value):
                setattr(module, name, 0.0)


def _as_in_scoring(module: nn.Module, _inputs: tuple[Any, ...]) -> None:
    """Put a module into evaluation mode before each of its passes."""
    module.eval()


def _quieten(model_type: str, config: Any) -> None:
    """Set a configuration's noise, and that of the configurations inside it, to 0."""
    for name, value in list(vars(config).items()):
        if is_noise(model_type, name, value):
            setattr(config, name, 0.0)
        elif name in EXACT:
            setattr(config, name, EXACT[name])
        elif name.endswith("config") and hasattr(value, "__dict__"):
            _quieten(model_type, value)
