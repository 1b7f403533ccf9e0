"""Reading a Hugging Face checkpoint: finding it, checking it from its headers, and taking a rank's slices of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalign.convert.model_config import ModelConfig
from megalign.convert.pointers import refuse_pointer
from megalign.convert.rules import EMBED, FAMILIES, Piece, Rule, find_rule
from megalign.convert.safetensors_file import NAMES, Spec
from megalign.convert.stored import INDEX, PICKLE_INDEX, STORED, StoredFiles
from megalign.schema import UserError, expand_path, hub_hint

HEAD = "lm_head.weight"
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


DOWNLOADED = ("config.json", "generation_config.json", INDEX, "*.safetensors", *TOKENIZER_FILES)


def resolve_model(path: str, *, allow_pickle: bool = False) -> Path:
    """A local checkpoint directory; `hf://org/name[@revision]` is downloaded (or found in the cache) first."""
    try:
        folder = _download(path, allow_pickle) if path.startswith("hf://") else Path(expand_path(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not folder.is_dir():
        raise UserError(
            f"{path} is not a directory; needed: a Hugging Face checkpoint directory or hf://org/name{hub_hint(path)}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; needed: a Hugging Face checkpoint directory")
    weights, _, _ = StoredFiles.find(folder, allow_pickle=allow_pickle)
    others = (match for pattern in ("*config.json", *TOKENIZER_FILES) for match in sorted(folder.glob(pattern)))
    for file in (*weights, *others):
        refuse_pointer(file)
    return folder


def _download(path: str, allow_pickle: bool) -> Path:
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", path)
    if not match:
        raise UserError(f"{path} is not a model on the hub; needed: hf://org/name or hf://org/name@revision")
    # Imported here: it takes a second, and local directories do without it.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                match[1],
                revision=match[2],
                allow_patterns=[*DOWNLOADED, *([PICKLE_INDEX, "pytorch_model*.bin"] if allow_pickle else [])],
                ignore_patterns=["*/*.safetensors", "consolidated*"],
            )
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} could not be downloaded ({reason}); check name, revision, access rights and network, "
            "or download it elsewhere and give the directory"
        ) from None


class HFSource:
    """The tensors of a checkpoint, mapped into memory and dequantised: nothing is read before it is used.

    Checks when made, from the headers alone, that each tensor the model needs is there once, in its shape, and that
    nothing else is there but what the family knows to ignore. `allow_pickle` also reads `pytorch_model.bin`, through
    torch's unpickler of plain tensors.
    """

    def __init__(self, hf_dir: Path, cfg: ModelConfig, *, allow_pickle: bool = False) -> None:
        self.hf_dir, self.cfg = Path(hf_dir), cfg
        self.stored = StoredFiles(self.hf_dir, allow_pickle=allow_pickle)
        self.specs = _audit(self.stored, cfg)
        self.head_checked = not (cfg.tied and HEAD in self.stored.files)

    def pieces(self, rule: Rule, place: Mapping[str, int]) -> list[Tensor]:
        """The pieces of a Megatron tensor, as views of the files where they are not quantised."""
        names = [piece.name.format(**place) for piece in rule.pieces]
        if rule.pieces[0] == EMBED and not self.head_checked:
            _check_tied_copy(self.stored.files[HEAD], self.stored.tensor(names[0]), self.stored.tensor(HEAD))
            self.head_checked = True
        found: dict[str, Tensor] = {}  # what several pieces are of is read once
        for piece, name in zip(rule.pieces, names, strict=True):
            if name not in found:
                stored = self.stored
                found[name] = stored.expert(name, place["e"]) if piece.of_experts else stored.tensor(name)
        return [piece.view_of_one(found[name], self.cfg) for piece, name in zip(rule.pieces, names, strict=True)]

    def close(self) -> None:
        """Let go of the files."""
        self.stored.close()


def audit(hf_dir: Path, cfg: ModelConfig) -> dict[str, Path]:
    """Where each tensor of the checkpoint lies, after the checks that `HFSource` makes."""
    source = HFSource(hf_dir, cfg)
    try:
        return dict(source.stored.files)
    finally:
        source.close()


def _audit(stored: StoredFiles, cfg: ModelConfig) -> dict[str, Spec]:
    """The model's tensors as `StoredFiles.tensor` gives them."""
    family = FAMILIES[cfg.family]
    needed = needed_shapes(cfg)
    ignorable = [one.replace("{num_layers}", str(cfg.num_layers)) for one in family.ignorable]
    ignorable += [re.escape(HEAD)] if cfg.tied else []
    specs = {}
    for name, path in stored.files.items():
        if name in needed:
            specs[name] = Spec(needed[name], _checked_dtype(stored, name, needed[name]))
        elif not any(re.fullmatch(pattern, name) for pattern in ignorable):
            raise UserError(f"{path}: tensor {name} has no place in this {family.architecture} (config.json)")
    missing = [name for name in needed if name not in stored.files]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{stored.folder}: tensor {missing[0]} is missing{more}; {family.architecture} (config.json) needs it"
        )
    return {name: specs[name] for name in needed}


def _checked_dtype(stored: StoredFiles, name: str, shape: tuple[int, ...]) -> torch.dtype:
    path, (found, dtype) = stored.files[name], stored.describe(name)
    if found != shape:
        raise UserError(f"{path}: tensor {name} has shape {list(found)}; config.json asks for {list(shape)}")
    if dtype not in STORED.values():
        raise UserError(f"{path}: tensor {name} is stored as {NAMES.get(dtype, dtype)}; allowed: {', '.join(STORED)}")
    return dtype


def needed_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors of a model and their shapes, in the order of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts = range(0 if cfg.moe is None else cfg.moe.num_experts)
    rules = [rule for rule in FAMILIES[cfg.family].rules if not rule.copy]
    before = [rule for rule in rules if "{i}" not in rule.megatron and rule.pieces[0] == EMBED]
    layered = [rule for rule in rules if "{i}" in rule.megatron]
    after = [rule for rule in rules if rule not in before and rule not in layered]
    places = [(rule, place) for rule in before for place in rule.places(cfg, (0,), experts)]
    places += [
        (rule, place) for i in range(cfg.num_layers) for rule in layered for place in rule.places(cfg, (i,), experts)
    ]
    places += [(rule, place) for rule in after for place in rule.places(cfg, (0,), experts)]
    for rule, place in places:
        shapes.update({piece.name.format(**place): piece.stored_shape(cfg) for piece in rule.pieces})
    return shapes


def load_shard(
    hf_dir: Path, cfg: ModelConfig, names: Sequence[str], *, tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each named Megatron tensor, in the stored dtype, in memory of its own.

    Checks the checkpoint when called; then touches only the bytes of that part. Vocabulary rows beyond the real ones
    are zero.
    """
    _check_tensor_parallel(cfg, tp_size)
    return _stream(HFSource(hf_dir, cfg), cfg, names, tp_rank, tp_size)


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
    source: HFSource, cfg: ModelConfig, names: Sequence[str], tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    try:
        for name in names:
            rule, place = find_rule(name, cfg)
            wholes = zip(source.pieces(rule, place), rule.pieces, strict=True)
            cut = [_cut(whole, piece, cfg, rule.tp_dim, tp_rank, tp_size) for whole, piece in wholes]
            joined = rule.layout.join(cut, cfg)
            # A slice may be a view of the mapped file, which whoever gets it must not depend on.
            yield name, joined.clone(memory_format=torch.contiguous_format) if len(cut) == 1 else joined
    finally:
        source.close()


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
    if embedding.dtype != head.dtype or not torch.equal(embedding, head):
        raise UserError(
            f"{path}: lm_head.weight differs from {EMBED.name} although tie_word_embeddings is true in config.json; "
            "set it to false, or drop lm_head.weight"
        )
