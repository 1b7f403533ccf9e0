"""Converts checkpoints between Hugging Face and Megatron's `torch_dist` format, tensor by tensor, without Megatron.

The written checkpoints load at any parallel layout, so no function here takes one.
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
from megalign.convert.hf.companions import changed_config, config_changes, read_companions
from megalign.convert.hf.config_json import read_json
from megalign.convert.hf.export_dir import check_target
from megalign.convert.hf.model import read_model
from megalign.convert.hf.reader import HFSource, resolve_model
from megalign.convert.hf.safetensors_file import Spec, plan_shards
from megalign.convert.hf.writer import DEFAULT_SHARD_BYTES, HFWriter
from megalign.convert.megatron.checkpoint_dir import HF_FILES
from megalign.convert.megatron.keys import checkpoint_key, extra_state_of, whole_shape
from megalign.convert.megatron.reader import key_specs, whole_names
from megalign.convert.megatron.torch_dist_file import TorchDistFile, write_index
from megalign.convert.rules import find_rule
from megalign.convert.saved import open_saved
from megalign.files import PartialFolder
from megalign.model_config import Lora, ModelConfig
from megalign.schema import UserError


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """Settings of a conversion; only `max_shard_bytes` changes what is written: the file sizes."""

    workers: int = 1  # threads; each holds one tensor at a time
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    allow_pickle: bool = False
    begin: Callable[[int], None] = lambda total: None  # called with the number of bytes to write
    wrote: Callable[[int], None] = lambda count: None  # called by several threads with the bytes just written
    ended: threading.Event = field(default_factory=threading.Event)  # set when a thread failed: the others stop

    def reported(self, count: int) -> None:
        """Report the bytes of a written tensor; CancelledError where another thread has failed."""
        self.wrote(count)
        if self.ended.is_set():
            raise CancelledError

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run all jobs on the worker threads; the first error or an interrupt stops all of them and is raised."""
        self.ended.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in as_completed([pool.submit(job) for job in jobs]):
                    future.result()
            except BaseException:
                self.ended.set()
                pool.shutdown(cancel_futures=True)
                raise


def hf_to_megatron(hf_dir: str, out_dir: Path, options: ConversionOptions | None = None) -> None:
    """Convert a Hugging Face checkpoint to a Megatron checkpoint, keeping the stored dtypes.

    When interrupted, it leaves nothing under `out_dir`; called again, it reuses the files finished so far. Raises
    UserError for a damaged or unknown checkpoint, or a target that is not new or empty; then nothing is kept.
    """
    options = options or ConversionOptions()
    folder = resolve_model(hf_dir, allow_pickle=options.allow_pickle)
    hf_model = read_model(folder)
    model = hf_model.known()
    check_target(out_dir, folder, overwrite=False)
    beside = read_companions(folder)
    source = HFSource(folder, model, allow_pickle=options.allow_pickle)
    try:
        specs = megatron_specs(source)

        def fingerprint() -> str:
            files = sorted(set(source.stored.raw_files.values()))
            return _fingerprint("hf_to_megatron", folder, files, options.max_shard_bytes)

        key = fingerprint()
        with PartialFolder(out_dir, key=key) as partial:
            shards = {f"__0_{n}.distcp": names for n, names in enumerate(plan_shards(specs, options.max_shard_bytes))}
            left = {file: shard for file, shard in shards.items() if file not in partial.done}
            total = sum(spec.num_bytes for shard in left.values() for spec in shard.values())
            partial.need(total)
            options.begin(total)
            options.run(_file_writer(source, partial, *item, options) for item in left.items())
            _refuse_change(folder, key, fingerprint())
            dtype = model_dtype(specs, model)
            about = {"dtype": str(dtype), "optimizer": False, "lora": None}
            by_key = key_specs(specs, model)
            write_index(partial.path, by_key, partial.done, {"extra": {}, "about": about})
            config = changed_config(hf_model, config_changes(hf_model))
            for name, content in {"config.json": config, **beside}.items():
                partial.write(f"{HF_FILES}/{name}", content)
    finally:
        source.close()


def _file_writer(
    source: HFSource, partial: PartialFolder, file: str, shard: Mapping[str, Spec], options: ConversionOptions
) -> Callable[[], None]:
    """Return the function that writes one file of a Megatron checkpoint."""

    def write() -> None:
        out = TorchDistFile(partial.path / file)
        try:
            for name, spec in shard.items():
                key, index, _ = checkpoint_key(name, source.model)
                offset, sizes = (*index, *[0] * len(spec.shape)), ((1,) * len(index) + spec.shape)
                out.append(key, offset, sizes, megatron_blocks(source, name))
                state = extra_state_of(name, source.model)
                if state is not None:
                    out.append_object(state, None)
                options.reported(spec.num_bytes)
            out.close()
        finally:
            out.abandon()
        partial.finish(file, out.entries)

    return write


def megatron_blocks(source: HFSource, name: str) -> list[Tensor]:
    """Read an unsharded Megatron tensor as runs of rows, vocabulary padding included; mostly views of mapped files."""
    model = source.model
    rule, indices = find_rule(name, model)
    blocks = list(rule.layout.blocks(source.pieces(rule, indices), model))
    if rule.pieces[0].axes[0] == "vocab":
        blocks.append(blocks[0].new_zeros(model.padded_vocab_size - model.vocab_size, *blocks[0].shape[1:]))
    return blocks


def megatron_specs(source: HFSource) -> dict[str, Spec]:
    """Return the Megatron tensors of a checkpoint; UserError where tensors to be joined differ in dtype."""
    specs: dict[str, Spec] = {}
    by_key: dict[str, tuple[torch.dtype, str]] = {}
    for name in whole_names(source.model):
        rule, indices = find_rule(name, source.model)
        key, _, _ = checkpoint_key(name, source.model)
        for piece in rule.pieces:
            stored = piece.name.format(**indices)
            dtype = source.specs[stored].dtype
            first, witness = by_key.setdefault(key, (dtype, stored))
            if dtype != first:
                raise UserError(
                    f"{source.hf_dir} stores {witness} as {_dtype_name(first)} and {stored} as {_dtype_name(dtype)}; "
                    "must be one dtype, for they become one tensor"
                )
        specs[name] = Spec(whole_shape(name, source.model), by_key[key][0])
    return specs


def model_dtype(specs: Mapping[str, Spec], model: ModelConfig) -> torch.dtype:
    """Return the dtype of most bytes of a model, not counting tensors with a fixed dtype."""
    sizes: dict[torch.dtype, int] = {}
    for name, spec in specs.items():
        if find_rule(name, model)[0].dtype is None:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def megatron_to_hf(
    checkpoint: Path, out_dir: Path, options: ConversionOptions | None = None, *, dtype: torch.dtype | None = None
) -> None:
    """Convert a checkpoint to a Hugging Face directory, in `dtype` (None: as stored).

    The checkpoint is one of a training run, with either engine, or of `hf_to_megatron`. LoRA adapters are merged, and
    also written to `adapter/` in PEFT's format. When interrupted, it leaves nothing under `out_dir`; called again, it
    reuses the files finished so far. Raises UserError for a directory that is no megalign checkpoint, or a target that
    is not new or empty.
    """
    options = options or ConversionOptions()
    check_target(out_dir, checkpoint / HF_FILES, overwrite=False)
    source = open_saved(checkpoint)
    specs = source.specs_in(dtype)

    def fingerprint() -> str:
        return _fingerprint("megatron_to_hf", checkpoint, source.files, options.max_shard_bytes, str(dtype))

    key = fingerprint()
    with HFWriter(
        out_dir, source=checkpoint / HF_FILES, specs=specs, max_shard_bytes=options.max_shard_bytes, key=key
    ) as writer:
        left = writer.missing
        options.begin(sum(specs[name].num_bytes for name in left))

        def copy(names: Sequence[str]) -> Callable[[], None]:
            def write() -> None:
                for name in names:
                    writer.add(name, source.tensor(name))
                    options.reported(specs[name].num_bytes)

            return write

        # One file per worker, because two threads that write to one file wait for each other in the kernel.
        by_file: dict[str, list[str]] = {}
        for name in left:
            by_file.setdefault(writer.file_of[name], []).append(name)
        options.run(copy(names) for names in by_file.values())
        _refuse_change(checkpoint, key, fingerprint())
        if source.lora is not None:
            write_adapter(writer, source.adapters(), source.lora, base=source.base)


def write_adapter(writer: HFWriter, named: Iterable[tuple[str, Tensor]], lora: Lora, *, base: str | None) -> bool:
    """Add the adapters to an export in PEFT's format; return false, writing nothing, where PEFT cannot name them.

    PEFT has no names for adapters of single experts. base: the base model, as in `model.path`; None: not known.
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


def adapter_config(lora: Lora, *, base: str) -> dict[str, Any]:
    """Return the fields of PEFT's `LoraConfig`; a base `hf://org/name@revision` is split into name and revision."""
    name, revision = base, None
    if base.startswith("hf://"):
        name, _, revision = base.removeprefix("hf://").partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _fingerprint(kind: str, folder: Path, files: Sequence[Path], *settings: object) -> str:
    """Hash everything that determines the output; used to resume an interrupted conversion."""
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    config = folder / "config.json" if (folder / "config.json").is_file() else folder / HF_FILES / "config.json"
    content = [
        kind,
        __version__,
        str(folder.resolve()),
        seen,
        read_json(config),
        [str(setting) for setting in settings],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _refuse_change(folder: Path, before: str, after: str) -> None:
    """Raise UserError where the fingerprint of the source has changed during the conversion."""
    if before != after:
        raise UserError(f"{folder} has changed while it was read; must be a checkpoint that nobody writes to")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
