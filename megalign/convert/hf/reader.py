"""Finds or downloads a Hugging Face checkpoint, checks its file headers, and reads one rank's shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalign.convert.hf.safetensors_file import NAMES, Spec
from megalign.convert.hf.weight_files import INDEX, PICKLE_INDEX, STORED, StoredFiles
from megalign.convert.naming import shard_piece
from megalign.convert.rules import EMBED, FAMILIES, Rule, find_rule
from megalign.git_lfs import refuse_pointer
from megalign.model_config import ModelConfig
from megalign.schema import UserError, expand_path, hub_hint, is_local

HEAD = "lm_head.weight"
HUB_MODEL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
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
    """Return a local checkpoint directory; download `hf://org/name[@revision]` (or find it in the cache) first."""
    try:
        folder = _download(path, allow_pickle) if path.startswith("hf://") else Path(expand_path(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not folder.is_dir():
        hub = "" if is_local(path) else f" or hf://org/name{hub_hint(path)}"
        raise UserError(f"{path} is not a directory; must be a Hugging Face checkpoint directory{hub}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} holds no config.json; must be a Hugging Face checkpoint directory")
    weights, _, _ = StoredFiles.find(folder, allow_pickle=allow_pickle)
    others = (match for pattern in ("*config.json", *TOKENIZER_FILES) for match in sorted(folder.glob(pattern)))
    for file in (*weights, *others):
        refuse_pointer(file)
    return folder


def _download(path: str, allow_pickle: bool) -> Path:
    match = HUB_MODEL.fullmatch(path)
    if not match:
        raise UserError(f"{path} is not a model on the hub; must be hf://org/name or hf://org/name@revision")
    # Imported here, because it takes a second and local directories do not need it.
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


def cached_model(path: str) -> Path | None:
    """Return the local directory of a path or of `hf://org/name[@revision]`, without any download; None if absent."""
    match = HUB_MODEL.fullmatch(path)
    if match is None:
        try:
            folder = Path(expand_path(path))
        except ValueError:
            return None
        return folder if (folder / "config.json").is_file() else None
    # Imported here, because it takes a second and local directories do not need it.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(match[1], revision=match[2], local_files_only=True))
        weights, _, _ = StoredFiles.find(folder, allow_pickle=False)
    except Exception:  # not there, or not whole: what raises differs between versions
        return None
    return folder if all(file.exists() for file in weights) else None


class HFSource:
    """Reads the tensors of a checkpoint lazily, from mapped files, and dequantises them.

    The constructor checks, from the headers alone, that each tensor the model needs is there once, in its shape, and
    that there are no others except those the family ignores. `allow_pickle` also reads `pytorch_model.bin`, through
    torch's unpickler of plain tensors.
    """

    def __init__(self, hf_dir: Path, model: ModelConfig, *, allow_pickle: bool = False) -> None:
        self.hf_dir, self.model = Path(hf_dir), model
        self.stored = StoredFiles(self.hf_dir, allow_pickle=allow_pickle)
        self.specs = _audit(self.stored, model)
        self.head_checked = not (model.tied and HEAD in self.stored.files)

    def pieces(self, rule: Rule, indices: Mapping[str, int]) -> list[Tensor]:
        """Read the pieces of a Megatron tensor; views of the mapped files where they are not quantised."""
        names = [piece.name.format(**indices) for piece in rule.pieces]
        if rule.pieces[0] == EMBED and not self.head_checked:
            embedding, head = ((name, self.stored.tensor(name)) for name in (names[0], HEAD))
            check_tied_copy(self.stored.files[HEAD], embedding, head)
            self.head_checked = True
        tensors: dict[str, Tensor] = {}  # a tensor that holds several pieces is read once
        for piece, name in zip(rule.pieces, names, strict=True):
            if name not in tensors:
                stored = self.stored
                tensors[name] = stored.expert(name, indices["e"]) if piece.of_experts else stored.tensor(name)
        return [piece.view_of_expert(tensors[name], self.model) for piece, name in zip(rule.pieces, names, strict=True)]

    def close(self) -> None:
        """Close the files."""
        self.stored.close()


def audit(hf_dir: Path, model: ModelConfig) -> dict[str, Path]:
    """Check a checkpoint as `HFSource` does, and return the file of each tensor."""
    source = HFSource(hf_dir, model)
    try:
        return dict(source.stored.files)
    finally:
        source.close()


def _audit(stored: StoredFiles, model: ModelConfig) -> dict[str, Spec]:
    """Check names, shapes and dtypes, and return the model's tensors with the dtypes `StoredFiles.tensor` returns."""
    family = FAMILIES[model.family]
    needed = needed_shapes(model)
    ignorable = family_ignores(model) + ([re.escape(HEAD)] if model.tied else [])
    specs = {}
    for name, path in stored.files.items():
        if name in needed:
            specs[name] = Spec(needed[name], checked_dtype(stored, name, needed[name]))
        elif not any(re.fullmatch(pattern, name) for pattern in ignorable):
            raise UserError(f"{path}: tensor {name} has no place in this {family.architecture} (config.json)")
    missing = [name for name in needed if name not in stored.files]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{stored.folder}: tensor {missing[0]} is missing{more}; {family.architecture} (config.json) needs it"
        )
    return {name: specs[name] for name in needed}


def family_ignores(model: ModelConfig | None) -> list[str]:
    """Return patterns of whole names of stored tensors that no model of a family has; none for unknown families."""
    patterns = () if model is None else FAMILIES[model.family].ignorable
    return [f"^{pattern.replace('{num_layers}', str(model.num_layers))}$" for pattern in patterns if model is not None]


def checked_dtype(stored: StoredFiles, name: str, shape: tuple[int, ...]) -> torch.dtype:
    """Return a tensor's dtype; UserError where its shape is another or the dtype is not read."""
    path, (stored_shape, dtype) = stored.files[name], stored.describe(name)
    if stored_shape != shape:
        raise UserError(f"{path}: tensor {name} has shape {list(stored_shape)}; config.json asks for {list(shape)}")
    if dtype not in STORED.values():
        raise UserError(
            f"{path}: tensor {name} is stored as {NAMES.get(dtype, dtype)}; must be one of {', '.join(STORED)}"
        )
    return dtype


def needed_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a model's Hugging Face tensors, in model order."""
    shapes: dict[str, tuple[int, ...]] = {}
    experts = range(0 if model.moe is None else model.moe.num_experts)
    rules = [rule for rule in FAMILIES[model.family].rules if not rule.copy]
    before = [rule for rule in rules if "{i}" not in rule.megatron and rule.pieces[0] == EMBED]
    layered = [rule for rule in rules if "{i}" in rule.megatron]
    after = [rule for rule in rules if rule not in before and rule not in layered]
    wanted = [(rule, indices) for rule in before for indices in rule.indices(model, (0,), experts)]
    wanted += [
        (rule, indices)
        for i in range(model.num_layers)
        for rule in layered
        for indices in rule.indices(model, (i,), experts)
    ]
    wanted += [(rule, indices) for rule in after for indices in rule.indices(model, (0,), experts)]
    for rule, indices in wanted:
        shapes.update({piece.name.format(**indices): piece.stored_shape(model) for piece in rule.pieces})
    return shapes


def load_shard(
    hf_dir: Path, model: ModelConfig, names: Sequence[str], *, tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor-parallel shard) of each named Megatron tensor, in the stored dtype, as a copy.

    Checks the checkpoint when called, then reads only the bytes of the shards. Vocabulary padding rows are zero.
    """
    _check_tensor_parallel(model, tp_size)
    return _stream(HFSource(hf_dir, model), model, names, tp_rank, tp_size)


def _check_tensor_parallel(model: ModelConfig, tp_size: int) -> None:
    counts = {
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.ffn_size if any(not model.has_experts(i) for i in range(model.num_layers)) else 0,
        "shared_expert_intermediate_size": 0 if model.moe is None else model.moe.shared_ffn_size,
        "the padded vocabulary": model.padded_vocab_size,
    }
    for what, count in counts.items():
        if count % tp_size:
            raise UserError(f"parallel.tensor is {tp_size}; must divide {what}, {count}")


def _stream(
    source: HFSource, model: ModelConfig, names: Sequence[str], tp_rank: int, tp_size: int
) -> Iterator[tuple[str, Tensor]]:
    try:
        for name in names:
            rule, indices = find_rule(name, model)
            wholes = zip(source.pieces(rule, indices), rule.pieces, strict=True)
            parts = [shard_piece(whole, piece, model, rule.tp_dim, tp_rank, tp_size) for whole, piece in wholes]
            joined = rule.layout.join(parts, model)
            # A shard may be a view of the mapped file, which is closed afterwards.
            yield name, joined.clone(memory_format=torch.contiguous_format) if len(parts) == 1 else joined
    finally:
        source.close()


def check_tied_copy(path: Path, embedding: tuple[str, Tensor], head: tuple[str, Tensor]) -> None:
    """Raise UserError for a stored head that differs from the tied embedding: transformers would untie it."""
    if embedding[1].dtype != head[1].dtype or not torch.equal(embedding[1], head[1]):
        raise UserError(
            f"{path}: {head[0]} differs from {embedding[0]} although tie_word_embeddings is true in config.json; "
            f"set it to false, or drop {head[0]}"
        )
