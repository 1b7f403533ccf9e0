"""Whole checkpoints between Hugging Face and Megatron's `torch_dist` format, a tensor at a time, without Megatron.

What is written loads at any layout; nothing here asks for one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign import __version__
from megalign.convert.config_file import read_json
from megalign.convert.hf_config import read_model_config
from megalign.convert.megatron_source import HF_FILES, MegatronSource, key_specs, whole_names
from megalign.convert.model_config import ModelConfig
from megalign.convert.partial import PartialFolder, write_synced
from megalign.convert.reader import HFSource, resolve_model
from megalign.convert.rules import find_rule
from megalign.convert.safetensors_file import Spec, plan_shards
from megalign.convert.torch_dist import (
    TorchDistFile,
    extra_state_of,
    place_of,
    whole_shape,
    write_index,
)
from megalign.convert.writer import (
    DEFAULT_SHARD_BYTES,
    HFWriter,
    changed,
    check_target,
    config_changes,
    fixed_dtypes,
    read_companions,
)
from megalign.schema import UserError


@dataclass(frozen=True, slots=True)
class How:
    """How a conversion runs; nothing of it changes what is written but the sizes of files."""

    workers: int = 1  # threads, each of which holds one tensor
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    allow_pickle: bool = False
    begin: Callable[[int], None] = lambda total: None  # told all bytes there are to write
    wrote: Callable[[int], None] = lambda count: None  # told bytes as they are written, by several threads
    ended: threading.Event = field(default_factory=threading.Event)  # one thread failed: the others need not go on

    def told(self, count: int) -> None:
        """After each tensor: report it, and stop where another thread has failed."""
        self.wrote(count)
        if self.ended.is_set():
            raise CancelledError

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """All jobs on the workers; the first that fails, or an interrupt, ends all with its error."""
        self.ended.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for one in as_completed([pool.submit(job) for job in jobs]):
                    one.result()
            except BaseException:
                self.ended.set()
                pool.shutdown(cancel_futures=True)
                raise


def hf_to_megatron(hf_dir: str, out_dir: Path, how: How | None = None) -> None:
    """Write a Hugging Face checkpoint as a Megatron one, in the dtypes it is stored in.

    Interrupted, it leaves nothing under `out_dir`, and goes on with its finished files when called again. Raises
    UserError for a checkpoint that is damaged or unknown, or a target that is not new or empty; then nothing stays.
    """
    how = how or How()
    folder = resolve_model(hf_dir, allow_pickle=how.allow_pickle)
    model = read_model_config(folder)
    check_target(out_dir, folder, overwrite=False)
    beside = read_companions(folder)
    source = HFSource(folder, model, allow_pickle=how.allow_pickle)
    try:
        specs = megatron_specs(source)

        def fingerprint() -> str:
            files = sorted(set(source.stored.raw_files.values()))
            return _fingerprint("hf_to_megatron", folder, files, how.max_shard_bytes)

        key = fingerprint()
        with PartialFolder(out_dir, key=key) as partial:
            shards = {f"__0_{n}.distcp": names for n, names in enumerate(plan_shards(specs, how.max_shard_bytes))}
            left = {file: shard for file, shard in shards.items() if file not in partial.done}
            total = sum(spec.num_bytes for shard in left.values() for spec in shard.values())
            partial.need(total)
            how.begin(total)
            how.run(_file_writer(source, partial, *one, how) for one in left.items())
            _refuse_change(folder, key, fingerprint())
            dtype = model_dtype(specs, model)
            about = {"dtype": str(dtype), "optimizer": False, "lora": None}
            by_key = key_specs(specs, model)
            write_index(partial.path, by_key, partial.done, {"extra": {}, "about": about})
            config = changed(folder / "config.json", config_changes(folder, model))
            for name, content in {"config.json": config, **beside}.items():
                write_synced(partial.path / HF_FILES / name, content)
    finally:
        source.close()


def _file_writer(
    source: HFSource, partial: PartialFolder, file: str, shard: Mapping[str, Spec], how: How
) -> Callable[[], None]:
    """What writes one file of a Megatron checkpoint."""

    def write() -> None:
        out = TorchDistFile(partial.path / file)
        try:
            for name, spec in shard.items():
                key, index, _ = place_of(name, source.cfg)
                out.append(key, index, spec, megatron_blocks(source, name))
                state = extra_state_of(name, source.cfg)
                if state is not None:
                    out.append_empty_state(state)
                how.told(spec.num_bytes)
        finally:
            out.close()
        partial.finish(file, out.entries)

    return write


def megatron_blocks(source: HFSource, name: str) -> list[Tensor]:
    """A whole Megatron tensor as runs of its rows, the padding of the vocabulary included; views of the file mostly."""
    cfg = source.cfg
    rule, place = find_rule(name, cfg)
    blocks = list(rule.layout.blocks(source.pieces(rule, place), cfg))
    if rule.pieces[0].axes[0] == "vocab":
        blocks.append(blocks[0].new_zeros(cfg.padded_vocab_size - cfg.vocab_size, *blocks[0].shape[1:]))
    return blocks


def megatron_specs(source: HFSource) -> dict[str, Spec]:
    """The Megatron tensors of a checkpoint; UserError where tensors that become one are of different dtypes."""
    specs: dict[str, Spec] = {}
    by_key: dict[str, tuple[torch.dtype, str]] = {}
    for name in whole_names(source.cfg):
        rule, place = find_rule(name, source.cfg)
        key, _, _ = place_of(name, source.cfg)
        for piece in rule.pieces:
            stored = piece.name.format(**place)
            dtype = source.specs[stored].dtype
            first, witness = by_key.setdefault(key, (dtype, stored))
            if dtype != first:
                raise UserError(
                    f"{source.hf_dir} stores {witness} as {_word(first)} and {stored} as {_word(dtype)}; "
                    "needed: one dtype, for they become one tensor"
                )
        specs[name] = Spec(whole_shape(name, source.cfg), by_key[key][0])
    return specs


def model_dtype(specs: Mapping[str, Spec], model: ModelConfig) -> torch.dtype:
    """The dtype that most of a model is in."""
    sizes: dict[torch.dtype, int] = {}
    for name, spec in specs.items():
        if find_rule(name, model)[0].dtype is None:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def megatron_to_hf(
    checkpoint: Path, out_dir: Path, how: How | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Write a checkpoint of a run, or of `hf_to_megatron`, as a Hugging Face directory, in `dtype` or as it is stored.

    Adapters are merged, and lie beside in PEFT's format. Interrupted, it leaves nothing under `out_dir`, and goes on
    with its finished files when called again. Raises UserError for a directory that is no checkpoint of ours, or a
    target that is not new or empty.
    """
    how = how or How()
    check_target(out_dir, checkpoint / HF_FILES, overwrite=False)
    source = MegatronSource(checkpoint)
    fixed = fixed_dtypes(source.model)
    specs = {
        name: spec if dtype is None or name in fixed else Spec(spec.shape, dtype) for name, spec in source.specs.items()
    }

    def fingerprint() -> str:
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        return _fingerprint("megatron_to_hf", checkpoint, files, how.max_shard_bytes, str(dtype))

    key = fingerprint()
    with HFWriter(
        out_dir, source=checkpoint / HF_FILES, specs=specs, max_shard_bytes=how.max_shard_bytes, key=key
    ) as writer:
        left = writer.missing
        how.begin(sum(specs[name].num_bytes for name in left))

        def copy(names: Sequence[str]) -> Callable[[], None]:
            def write() -> None:
                for name in names:
                    writer.add(name, source.tensor(name))
                    how.told(specs[name].num_bytes)

            return write

        # A file for each worker: two that write to one wait for each other in the kernel.
        by_file: dict[str, list[str]] = {}
        for name in left:
            by_file.setdefault(writer.file_of[name], []).append(name)
        how.run(copy(names) for names in by_file.values())
        _refuse_change(checkpoint, key, fingerprint())
        if source.lora is not None:
            write_adapter(writer, source.adapters(), source.lora, base=source.base)


def write_adapter(
    writer: HFWriter, named: Iterable[tuple[str, Tensor]], lora: Mapping[str, Any], *, base: str | None
) -> bool:
    """Add `adapter/` to an export; whether PEFT has a place for it: it has none for adapters of single experts.

    base: the model that the adapters are for, as `model.path` names it; None where a checkpoint does not say.
    """
    tensors: dict[str, Tensor] = {}
    possible = True
    for name, tensor in named:
        possible = possible and ".experts." not in name
        if possible:
            tensors[f"base_model.model.{name}"] = tensor.cpu().clone()
    if possible:
        writer.add_adapter(tensors, adapter_config(lora, base=base or str(writer.source)))
    return possible


def adapter_config(lora: Mapping[str, Any], *, base: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads; of `hf://org/name@revision` the name and revision, as transformers takes them."""
    name, revision = base, None
    if base.startswith("hf://"):
        name, _, revision = base.removeprefix("hf://").partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": list(lora["targets"]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _fingerprint(kind: str, folder: Path, files: Sequence[Path], *settings: object) -> str:
    """The same as long as a conversion would write the same."""
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    config = folder / "config.json" if (folder / "config.json").is_file() else folder / HF_FILES / "config.json"
    said = [kind, __version__, str(folder.resolve()), seen, read_json(config), [str(one) for one in settings]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _refuse_change(folder: Path, before: str, after: str) -> None:
    if before != after:
        raise UserError(f"{folder} has changed while it was read; needed: a checkpoint that nobody writes to")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
