"""Every family through Megatron's format and back, bit by bit; interrupted, and by several threads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalign.convert import load_shard, read_model_config
from megalign.convert.hf.model import read_model
from megalign.convert.hf.reader import HFSource
from megalign.convert.hf.safetensors_file import Spec
from megalign.convert.megatron.keys import extra_state_of
from megalign.convert.megatron.reader import key_specs, whole_names
from megalign.convert.megatron.torch_dist import TorchDistReader
from megalign.convert.report import compare, tensor_map, tensor_map_back
from megalign.convert.transfer import ConversionOptions, adapter_config, hf_to_megatron, megatron_specs, megatron_to_hf
from megalign.model_config import Lora
from megalign.runtime.distributed import process_group
from megalign.schema import UserError
from tests.support.families import EXPERT_FAMILIES, FAMILY_CASES, write_family
from tests.support.processes import run_ranks
from tests.support.tiny_checkpoints import CASES, COMPANIONS, EXPERT_CASES, write_checkpoint

if TYPE_CHECKING:
    from megalign.engines.megatron.engine import MegatronEngine

ALL = [*CASES, *EXPERT_CASES, *FAMILY_CASES]
IN_BF16 = [case for number, case in enumerate(FAMILY_CASES) if number % 2]  # the others in fp32
OTHERWISE = {
    f"{case}-otherwise": case for case in FAMILY_CASES
}  # in the other dtype; of the rest there are cases of both


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(a: Path, b: Path, *files: str) -> None:
    left, right = stored(a), stored(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name
    for name in ("config.json", *files):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for case in ALL:
        if case not in FAMILY_CASES:
            write_checkpoint(folder / case, case)
            continue
        for name in (case, f"{case}-otherwise"):
            in_bf16 = (case in IN_BF16) != (name in OTHERWISE)
            write_family(folder / name, case, dtype=torch.bfloat16 if in_bf16 else torch.float32)
            for file, content in COMPANIONS.items():
                (folder / name / file).parent.mkdir(exist_ok=True)
                (folder / name / file).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def converted(sources: Path) -> Path:
    for case in [*ALL, *OTHERWISE]:
        hf_to_megatron(str(sources / case), sources / f"{case}-megatron", ConversionOptions(2, max_shard_bytes=60_000))
    return sources


def test_there_and_back_is_bitwise(converted: Path) -> None:
    for case in [*ALL, *OTHERWISE]:
        megatron_to_hf(
            converted / f"{case}-megatron", converted / f"{case}-back", ConversionOptions(2, max_shard_bytes=50_000)
        )
        same(converted / case, converted / f"{case}-back", *COMPANIONS)
        assert not compare(converted / case, converted / f"{case}-megatron").differences


def keys_of_engines(folder: str) -> None:
    """What Megatron would save and load of each model is what is written, and loads to the weights of the source."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megalign.config.layout import Layout
    from megalign.engines.megatron.engine import MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.parts import METADATA
    from megalign.engines.megatron.shard import EngineOptions

    with process_group(timeout_s=60) as world:
        groups = make_groups(Layout(), timeout_s=60)
        for case in ALL:
            source, checkpoint = Path(folder) / case, Path(folder) / f"{case}-megatron"
            model = read_model_config(source)
            reader = TorchDistReader(checkpoint)
            dtype = getattr(torch, reader.common()["about"]["dtype"].removeprefix("torch."))
            engine = MegatronEngine(model, groups, EngineOptions(dtype=dtype, device=world.device), adamw=None)
            state = engine.shard.chunks[0].sharded_state_dict(metadata=dict(METADATA))
            plain, objects = {}, set()
            for entry in state.values():
                for one in entry.build() if hasattr(entry, "build") else [entry]:
                    if isinstance(one, ShardedObject):
                        objects.add(one.unique_key)
                    else:
                        plain[one.key] = Spec(tuple(one.global_shape), one.dtype)
            assert plain == reader.specs, case
            assert objects == {extra_state_of(name, model) for name in whole_names(model)} - {None}, case
            assert objects == set(reader.index.state_dict_metadata) - set(reader.specs), case
            loaded = dist_checkpointing.load({"model": state}, str(checkpoint))["model"]
            engine.shard.chunks[0].load_state_dict(loaded)
            fresh = MegatronEngine(model, groups, EngineOptions(dtype=dtype, device=world.device), adamw=None)
            fresh.load_weights(source)
            for (name, mine), (_, right) in zip(engine.full_tensors(), fresh.full_tensors(), strict=True):
                assert torch.equal(mine, right), (case, name)
            sampler_has_live_weights(engine, source, case)


def sampler_has_live_weights(engine: MegatronEngine, source: Path, case: str) -> None:
    """What rounds sample with is the model that transformers loads."""
    import transformers

    from megalign.rollout.transformers_sampler import TransformersSampler

    right = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=engine.dtype)
    sampler = transformers.AutoModelForCausalLM.from_config(right.config, dtype=engine.dtype)
    TransformersSampler(sampler, (0,)).update(engine.hf_tensors())
    expected = right.state_dict()
    for name, tensor in sampler.state_dict().items():
        assert torch.equal(tensor, expected[name]), (case, name)


def test_megatron_loads_what_is_written(converted: Path) -> None:
    run_ranks(keys_of_engines, 1, str(converted))


def is_routed(case: str) -> bool:
    return case in EXPERT_CASES or FAMILY_CASES[case][0] in EXPERT_FAMILIES


def steps_of_rate_zero(folder: str) -> None:
    """Each family loaded at TP2 x PP2 (experts over 2 ranks), a step of rate 0, and exported from there."""
    from megalign.config.layout import Layout
    from megalign.data.group import Response, TokenSequence
    from megalign.data.micro_batch import pack
    from megalign.engines.export import export
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.groups import make_groups
    from megalign.engines.megatron.shard import EngineOptions

    with process_group(timeout_s=120) as world:
        sequence = TokenSequence(0, 0, "response", (1, 2, 3), Response((4, 130)))
        groups = None
        for case in sorted([*EXPERT_CASES, *FAMILY_CASES], key=is_routed):
            layout = Layout(tensor=2, pipeline=2, expert=2 if is_routed(case) else 1, sequence=is_routed(case))
            if groups is None or groups.layout != layout:
                groups = make_groups(layout, timeout_s=60)
            source = Path(folder) / case
            model = read_model_config(source)
            bf16 = case in IN_BF16 or EXPERT_CASES.get(case, ("", ""))[1] == "bfloat16"
            dtype = torch.bfloat16 if bf16 else torch.float32
            options = EngineOptions(dtype=dtype, device=world.device)
            engine = MegatronEngine(model, groups, options, adamw=AdamW(weight_decay=0.1, clip_norm=1.0))
            engine.load_weights(source)
            batch = pack([sequence], [0], multiple_of=engine.shape.multiple_of)
            engine.backward([batch], lambda place, head: (head.logp()[0].sum(), None))
            assert engine.update(0.0) > 0
            export(engine, read_model(source), Path(folder) / f"{case}-2x2")


def test_a_step_of_rate_zero_gives_every_family_back(sources: Path) -> None:
    run_ranks(steps_of_rate_zero, 4, str(sources))
    for case in [*EXPERT_CASES, *FAMILY_CASES]:
        same(sources / case, sources / f"{case}-2x2", *COMPANIONS)


@pytest.mark.parametrize("case", ["llama-bias", "gpt-oss"])
def test_interrupted_conversions_go_on(sources: Path, tmp_path: Path, case: str) -> None:
    class Stop(Exception):
        pass

    def stopping(after: int) -> ConversionOptions:
        seen = []

        def wrote(count: int) -> None:
            seen.append(count)
            if len(seen) == after:
                raise Stop

        return ConversionOptions(max_shard_bytes=20_000, wrote=wrote)

    for convert, source, out, plain in (
        (lambda a, b, how: hf_to_megatron(str(a), b, how), sources / case, tmp_path / "m", sources / f"{case}-plain"),
        (megatron_to_hf, tmp_path / "m", tmp_path / "hf", None),
    ):
        with pytest.raises(Stop):
            convert(source, out, stopping(12))
        assert not out.exists()
        partial = out.with_name(f".{out.name}.partial")
        finished = {
            path: path.stat().st_mtime_ns for path in partial.iterdir() if "__" in path.name or "model" in path.name
        }
        assert finished
        again: list[int] = []
        totals: list[int] = []
        convert(source, out, ConversionOptions(max_shard_bytes=20_000, begin=totals.append, wrote=again.append))
        assert sum(again) == totals[0]
        kept = {path.name: stamp for path, stamp in finished.items() if (out / path.name).stat().st_mtime_ns == stamp}
        assert kept, "everything was written anew"
        assert not partial.exists()
        if plain is not None:
            hf_to_megatron(str(source), plain, ConversionOptions(max_shard_bytes=20_000))
            assert not compare(plain, out).differences
    same(sources / case, tmp_path / "hf")


def test_two_jobs_do_not_write_one_directory(sources: Path, tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(total: int) -> None:
        inside.set()
        assert go_on.wait(30)

    first = threading.Thread(
        target=hf_to_megatron, args=(str(sources / "qwen2"), tmp_path / "out", ConversionOptions(begin=wait))
    )
    first.start()
    try:
        assert inside.wait(30)
        with pytest.raises(UserError, match="is being written by another process"):
            hf_to_megatron(str(sources / "qwen2"), tmp_path / "out")
    finally:
        go_on.set()
        first.join()
    assert not compare(sources / "qwen2", tmp_path / "out").differences


def test_maps_name_every_tensor(converted: Path) -> None:
    for case in ALL:
        source = HFSource(converted / case, read_model_config(converted / case))
        specs = megatron_specs(source)
        assert set(key_specs(specs, source.model)) == set(TorchDistReader(converted / f"{case}-megatron").specs)
        assert tensor_map(str(converted / case)).row_count == len(specs)
        assert tensor_map_back(converted / f"{case}-megatron").row_count == len(stored(converted / case))


def test_differences_are_told(sources: Path, tmp_path: Path) -> None:
    source, other = sources / "qwen2", tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = stored(source)
    tensors["model.norm.weight"][3] += 2.0
    del tensors["lm_head.weight"]
    tensors["extra"] = torch.zeros(2)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].float()
    save_file(tensors, other / "model.safetensors")
    found = compare(source, other)
    assert {one.name for one in found.differences} == {
        "model.norm.weight",
        "lm_head.weight",
        "extra",
        "model.layers.0.mlp.down_proj.weight",
    }
    (norm,) = (one for one in found.differences if one.name == "model.norm.weight")
    assert (norm.count, norm.largest) == (1, pytest.approx(2.0, abs=0.02))
    assert "2 differ (largest difference " in found.summary()
    assert "), 1 only in A, 1 only in B" in found.summary()
    assert found.table(2).row_count == 3
    same_bits = compare(source, source)
    assert same_bits.summary().startswith(f"{len(stored(source))} tensors: {len(stored(source))} equal bit by bit, 0")


def test_blocks_of_fp8_are_multiplied_by_their_scales(sources: Path, tmp_path: Path) -> None:
    source, quantised = sources / "deepseek-v3", tmp_path / "fp8"
    tensors, whole = stored(source), {}
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        rows, columns = -(-weight.shape[0] // 16), -(-weight.shape[1] // 10)
        scale = torch.rand(rows, columns, generator=random) * 0.01 + 0.001
        small = (torch.randn(weight.shape, generator=random) * 100).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = small, scale
        slow = torch.empty(weight.shape)
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                slow[i, j] = float(small[i, j]) * scale[i // 16, j // 10]
        whole[name] = slow.bfloat16()
    assert len(whole) > 20
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32 and not name.endswith(("_scale_inv", "_bias")):
            tensors[name] = tensor.bfloat16()
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "bfloat16", "num_nextn_predict_layers": 1}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 10], "fmt": "e4m3"}
    tensors["model.layers.4.enorm.weight"] = torch.ones(3)  # of the layer that predicts one token more
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps(config))
    save_file(tensors, quantised / "model.safetensors")
    hf_to_megatron(str(quantised), tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    back = stored(tmp_path / "hf")
    assert "model.layers.4.enorm.weight" not in back and not any("scale" in name for name in back)
    for name, tensor in back.items():
        assert torch.equal(tensor, whole.get(name, tensors.get(name))), name
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in exported and exported["num_nextn_predict_layers"] == 0
    del config["quantization_config"]
    assert exported == {
        **config,
        "num_nextn_predict_layers": 0,
        **({"num_mtp_layers": 0} if config.get("num_mtp_layers") else {}),
    }
    assert not compare(quantised, tmp_path / "hf").differences or {
        one.name for one in compare(quantised, tmp_path / "hf").differences
    } == {"model.layers.4.enorm.weight"}


def test_experts_in_four_bits_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = write_family(tmp_path / "whole", "gpt-oss", dtype=torch.bfloat16, intermediate_size=32)
    tensors, right, packed = stored(source), {}, tmp_path / "packed"
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=random).to(torch.uint8)
        scales = torch.randint(115, 130, (experts, rows, columns // 32), generator=random).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        right[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert len(right) == 8
    config = json.loads((source / "config.json").read_text())
    packed.mkdir()
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    save_file(tensors, packed / "model.safetensors")
    hf_to_megatron(str(packed), tmp_path / "megatron", ConversionOptions(2))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    back = stored(tmp_path / "hf")
    assert back.keys() == stored(source).keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, right.get(name, tensors.get(name))), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == config
    assert not compare(packed, tmp_path / "hf").differences
    model = read_model_config(packed)
    fc1 = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    ((_, part),) = load_shard(packed, model, [fc1], tp_rank=1, tp_size=2)  # experts are whole on every tensor rank
    gate_up = right["model.layers.1.mlp.experts.gate_up_proj"][3].T
    assert torch.equal(part, torch.cat((gate_up[0::2], gate_up[1::2])))

    def refuse(change: dict[str, torch.Tensor | None], says: str) -> None:
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, packed / "model.safetensors")
        with pytest.raises(UserError, match=says):
            hf_to_megatron(str(packed), tmp_path / "refused")

    down = "model.layers.2.mlp.experts.down_proj"
    bad = tensors[f"{down}_scales"].clone()
    bad[1, 2, 0] = 255
    refuse({f"{down}_scales": bad}, rf"{down}_scales is 255 \(not a number\) at \[1, 2, 0\]; must be 0 to 254")
    refuse({f"{down}_scales": None}, f"tensor {down}_scales is missing; {down}_blocks is stored as MXFP4 and needs it")
    refuse({f"{down}_scales": bad[:, :, :0]}, rf"{down}_scales has shape \[4, 64, 0\]; must be \[4, 64, 1\]")
    refuse({f"{down}_blocks": bad}, rf"{down}_blocks has shape \[4, 64, 1\]; must be bytes")
    refuse({f"{down}_blocks": None}, rf"tensor {down}_scales has no place|tensor {down} is missing")


def test_pickles_are_read_behind_a_flag(sources: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    tensors = stored(sources / "qwen2")
    (folder / "config.json").write_bytes((sources / "qwen2" / "config.json").read_bytes())
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="never pickles; megalign convert reads its pickles with --allow-pickle"):
        hf_to_megatron(str(folder), tmp_path / "megatron")
    hf_to_megatron(str(folder), tmp_path / "megatron", ConversionOptions(allow_pickle=True))
    assert not compare(sources / "qwen2", tmp_path / "megatron").differences
    torch.save({"weight": threading.Thread}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a pickle of plain tensors"):
        hf_to_megatron(str(folder), tmp_path / "other", ConversionOptions(allow_pickle=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "megatron"]


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("models/mine", "models/mine", None),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@v1.2", "org/name", "v1.2"),
    ],
)
def test_adapters_name_their_base_as_the_user_does(base, name, revision):
    """And as `peft` looks for it: on the Hub without the scheme that `model.path` has."""
    import peft

    config = peft.LoraConfig(**adapter_config(Lora(2, 4.0, ("q_proj",)), base=base))
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
