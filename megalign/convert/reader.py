"""Reading a Hugging Face checkpoint: finding it, checking it from its headers, and taking a rank's slices of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalign.convert.config_file import read_json
from megalign.convert.model_config import ModelConfig
from megalign.convert.rules import EMBED, FAMILIES, Piece, find_rule
from megalign.schema import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def resolve_model(path: str) -> Path:
    """A local checkpoint directory; `hf://org/name[@revision]` is downloaded (or found in the cache) first."""
    folder = _download(path) if path.startswith("hf://") else Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is not a directory; needed: a Hugging Face checkpoint directory or hf://org/name")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; needed: a Hugging Face checkpoint directory")
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise UserError(f"{path} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles")
    return folder


def _download(path: str) -> Path:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", path)
    if not match:
        raise UserError(f"{path} is not a model on the hub; needed: hf://org/name or hf://org/name@revision")
    # Imported here: it takes a second, and local directories do without it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                match[1],
                revision=match[2],
                allow_patterns=["config.json", "generation_config.json", INDEX, "*.safetensors", *TOKENIZER_FILES],
                ignore_patterns=["*/*.safetensors", "consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} could not be downloaded ({reason}); check name, revision, access rights and network, "
            "or download it elsewhere and give the directory"
        ) from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from None


def _weight_files(hf_dir: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files that hold weights, and what the index says of them; one unsharded file wins, as in transformers."""
    if (hf_dir / SINGLE).is_file():
        return [hf_dir / SINGLE], {}
    if not (hf_dir / INDEX).is_file():
        raise UserError(f"{hf_dir} holds neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles")
    weight_map = read_json(hf_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{hf_dir / INDEX}: weight_map is {weight_map!r}; needed: tensor names and their files")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{hf_dir / INDEX}: weight_map.{tensor} is {file!r}; needed: a file beside the index")
    return [hf_dir / file for file in sorted(set(weight_map.values()))], weight_map


def audit(hf_dir: Path, cfg: ModelConfig) -> dict[str, Path]:
    """Where each tensor of the checkpoint lies, after checking from the headers alone that each one the model needs is
    there once, in its shape, and that nothing else is there but what the family knows to ignore."""
    hf_dir, family = Path(hf_dir), FAMILIES[cfg.family]
    needed = _needed_shapes(cfg)
    ignorable = [one.replace("{num_layers}", str(cfg.num_layers)) for one in family.ignorable]
    ignorable += [re.escape("lm_head.weight")] if cfg.tied else []
    files, weight_map = _weight_files(hf_dir)
    found: dict[str, Path] = {}
    for path in files:
        with _open(path) as handle:
            for name in handle.keys():  # noqa: SIM118  (not a mapping)
                if name in found:
                    raise UserError(f"{path}: tensor {name} is also in {found[name].name}; each must be there once")
                found[name] = path
                if name in needed:
                    _check_header(path, name, handle.get_slice(name), needed[name])
                elif not any(re.fullmatch(pattern, name) for pattern in ignorable):
                    raise UserError(f"{path}: tensor {name} has no place in this {family.architecture} (config.json)")
    for name, file in weight_map.items():
        if found.get(name) != hf_dir / file:
            raise UserError(f"{hf_dir / INDEX}: weight_map.{name} is {file!r}; that file does not hold the tensor")
    missing = [name for name in needed if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{hf_dir}: tensor {missing[0]} is missing{more}; {family.architecture} (config.json) needs it")
    return found


def _needed_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    experts = range(0 if cfg.moe is None else cfg.moe.num_experts)
    for rule in FAMILIES[cfg.family].rules:
        if not rule.copy:
            for place in rule.places(cfg, range(cfg.num_layers), experts):
                shapes.update({piece.name.format(**place): piece.stored_shape(cfg) for piece in rule.pieces})
    return shapes


def _check_header(path: Path, name: str, header: Any, shape: tuple[int, ...]) -> None:
    stored = tuple(header.get_shape())
    if stored != shape:
        raise UserError(f"{path}: tensor {name} has shape {list(stored)}; config.json asks for {list(shape)}")
    if header.get_dtype() not in STORED:
        raise UserError(f"{path}: tensor {name} is stored as {header.get_dtype()}; allowed: {', '.join(STORED)}")


def load_shard(
    hf_dir: Path, cfg: ModelConfig, names: Sequence[str], *, tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each named Megatron tensor, in the stored dtype, in memory of its own.

    Checks the checkpoint when called; then touches only the bytes of that part. Vocabulary rows beyond the real ones
    are zero.
    """
    _check_tensor_parallel(cfg, tp_size)
    return _stream(audit(hf_dir, cfg), cfg, names, tp_rank, tp_size)


def _check_tensor_parallel(cfg: ModelConfig, tp_size: int) -> None:
    counts = {
        "num_key_value_heads": cfg.num_kv_heads,
        "intermediate_size": cfg.ffn_size if any(not cfg.has_experts(i) for i in range(cfg.num_layers)) else 0,
        "shared_expert_intermediate_size": 0 if cfg.moe is None else cfg.moe.shared_ffn_size,
        "the padded vocabulary": cfg.padded_vocab_size,
    }
    for what, count in counts.items():
        if count % tp_size:
            raise UserError(f"parallel.tensor is {tp_size}; it must divide {what}, {count}")


def _stream(
    places: Mapping[str, Path], cfg: ModelConfig, names: Sequence[str], tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}

        def part(piece: Piece, place: Mapping[str, int], tp_dim: int | None) -> Tensor:
            stored = piece.name.format(**place)
            path = places[stored]
            if path not in handles:
                handles[path] = stack.enter_context(_open(path))
            # A view of the mapped file: nothing is read yet.
            return _cut(piece.view(handles[path].get_tensor(stored), place, cfg), piece, cfg, tp_dim, tp_rank, tp_size)

        for name in names:
            rule, place = find_rule(name, cfg)
            pieces = [part(piece, place, rule.tp_dim) for piece in rule.pieces]
            if cfg.tied and EMBED in rule.pieces and "lm_head.weight" in places:
                head = part(Piece("lm_head.weight", EMBED.axes), place, rule.tp_dim)
                _check_tied_copy(places["lm_head.weight"], pieces[0], head)
            joined = rule.layout.join(pieces, cfg)
            # A slice may be a view of the mapped file, which whoever gets it must not depend on.
            yield name, joined.clone(memory_format=torch.contiguous_format) if len(pieces) == 1 else joined


def _cut(whole: Tensor, piece: Piece, cfg: ModelConfig, tp_dim: int | None, tp_rank: int, tp_size: int) -> Tensor:
    """A rank's rows or columns of a piece; only the vocabulary is padded before the cut."""
    if tp_dim is None:
        return whole
    size = whole.shape[tp_dim]
    padded = cfg.padded_vocab_size if piece.axes[tp_dim] == "vocab" else size
    width = padded // tp_size
    start, stop = min(tp_rank * width, size), min((tp_rank + 1) * width, size)
    mine = whole.narrow(tp_dim, start, stop - start)
    if stop - start == width:
        return mine
    part = whole.new_zeros([width if dim == tp_dim else length for dim, length in enumerate(whole.shape)])
    part.narrow(tp_dim, 0, stop - start).copy_(mine)
    return part


def _check_tied_copy(path: Path, embedding: Tensor, head: Tensor) -> None:
    """A stored head beside tie_word_embeddings is harmless as a duplicate; transformers unties one that differs."""
    if not torch.equal(embedding, head):
        raise UserError(
            f"{path}: lm_head.weight differs from {EMBED.name} although tie_word_embeddings is true in config.json; "
            "set it to false, or drop lm_head.weight"
        )
