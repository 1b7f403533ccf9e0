"""Check defaults and overrides of configurations, and the error line of each wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megalign.config.job import JobConfig, dump_config, layout_of, load_config, total_steps
from megalign.config.layout import refusal
from megalign.config.yaml_file import hinted_run_dir, parse_yaml
from megalign.model_config import ModelConfig, Rope
from megalign.runtime.status import guarded, write_status
from megalign.schema import UserError

ROOT = Path(__file__).resolve().parents[2]

SMALLEST = """
run: {dir: runs/a, steps: 7}
model: {path: runs/model}
data: {path: data.jsonl, max_length: 128, groups_per_step: 8, tokens_per_micro_batch: 512}
loss: {name: gvpo}
optimizer: {lr: 1e-6}
"""
ROUNDS = """
run: {dir: runs/a}
model: {path: runs/model}
data: {max_length: 128, tokens_per_micro_batch: 512}
loss: {name: gvpo}
rollout:
  {path: p.jsonl, rounds: 5, prompts_per_round: 12, k: 4, max_new_tokens: 16, updates_per_round: 3, reward: exact_match}
optimizer: {lr: 1e-6}
"""


@pytest.fixture
def load(tmp_path: Path):
    """Load SMALLEST, or the text given, with overrides."""

    def load(*overrides: str, text: str = SMALLEST) -> JobConfig:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return load_config(str(path), overrides)

    return load


def test_defaults(load):
    # The table of section 8 of the design, key by key.
    assert yaml.safe_load(dump_config(load())) == {
        "run": {
            "dir": "runs/a",
            "seed": 0,
            "steps": 7,
            "epochs": None,
            "dtype": "bf16",
            "max_minutes": None,
            "max_bad_steps": 0,
            "max_pass_gap": "auto",
            "dump_steps": [],
            "deterministic": False,
        },
        "model": {"path": "runs/model", "aux_loss_coefficient": 0},
        "data": {
            "path": "data.jsonl",
            "sources": None,
            "format": "auto",
            "max_length": 128,
            "groups_per_step": 8,
            "tokens_per_micro_batch": 512,
            "packing": True,
            "shuffle": True,
            "on_bad_record": "stop",
            "extra_fields": "error",
            "train_on": "last_assistant",
            "filter": None,
            "special_tokens": "auto",
            "date": None,
        },
        "eval": {"path": None, "every": 0},
        "loss": {"name": "gvpo", "beta": 0.1},
        "reference": {"source": "initial", "cache_dir": None},
        "teachers": [],
        "rollout": None,
        "optimizer": {
            "lr": 1e-6,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "schedule": {"name": "constant", "warmup_steps": 0, "min_lr": 0.0},
        },
        "parallel": {
            "tensor": 1,
            "pipeline": 1,
            "virtual_pipeline": 1,
            "context": 1,
            "expert": 1,
            "sequence": False,
        },
        "lora": None,
        "engine": {
            "name": "megatron",
            "layers": "auto",
            "recompute": "none",
            "chunk_tokens": "auto",
            "tp_invariant": False,
            "head_kernel": "auto",
            "zero": {"stage": 2, "offload_optimizer": False, "offload_params": False},
            "megatron": {},
            "deepspeed_config": {},
        },
        "checkpoint": {"every": None, "keep": 2, "keep_every": 0, "async": False, "resume": "auto", "allow": []},
        "export": {"hf_dir": None, "every": 0},
        "watchdog": {"timeout_s": 600, "check_every": 100},
        "trackers": [],
    }


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_configuration_loads(name: str, tmp_path: Path):
    cfg = load_config(str(ROOT / "configs" / name), [])
    assert cfg.loss.name == name.split("_")[0].removesuffix(".yaml")
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(cfg))
    assert load_config(str(copy), []) == cfg


def test_dump_keeps_the_loss_fields_and_reference_that_were_resolved(load, tmp_path: Path):
    cfg = load("loss={name: grpo, variant: dapo, beta: 0.01}", "run.dump_steps=[1, 3]", "optimizer.clip_norm=none")
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(cfg))
    again = load_config(str(copy), [])
    assert again == cfg
    assert again.loss.model_dump()["clip_high"] == 0.28
    assert again.optimizer.clip_norm is None


def test_overrides_are_yaml_and_make_sections(load):
    cfg = load(
        "optimizer.lr=3e-4",
        "optimizer.schedule.name=cosine",
        "parallel.tensor=2",
        "run.steps=null",
        "run.epochs=0.5",
        "loss.beta=0.25",
        "engine.megatron.overlap_grad_reduce=true",
        "checkpoint.resume=never",
        "export.hf_dir=none",
        "run.dir=runs/b=c",
    )
    assert (cfg.optimizer.lr, cfg.optimizer.schedule.name, cfg.parallel.tensor) == (3e-4, "cosine", 2)
    assert (cfg.run.steps, cfg.run.epochs, cfg.run.dir) == (None, 0.5, "runs/b=c")
    assert cfg.loss.model_dump() == {"name": "gvpo", "beta": 0.25}
    assert cfg.engine.megatron == {"overlap_grad_reduce": True}
    assert cfg.export.hf_dir is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("-2E3", -2000.0), ("1.5e4", 15000.0), ("12", 12), ("e6", "e6"), ("1e", "1e"), ("v1e6", "v1e6")],
)
def test_floats_without_a_dot(text: str, value: object):
    parsed = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("loss", "source"),
    [
        ("{name: dpo}", "initial"),
        ("{name: epa}", "initial"),
        ("{name: gvpo}", "initial"),
        ("{name: grpo}", "none"),
        ("{name: grpo, beta: 0.04}", "initial"),
        ("{name: rloo}", "initial"),
        ("{name: rloo, beta: 0.0}", "none"),
        ("{name: sft}", "none"),
        ("{name: poft}", "none"),
    ],
)
def test_reference_follows_the_loss(load, loss: str, source: str):
    assert load(f"loss={loss}").reference.source == source


def test_reference_may_be_a_checkpoint_directory(load, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert load(f"reference.source={tmp_path}").reference.source == str(tmp_path)


def test_rounds_give_steps_and_groups(load):
    cfg = load(text=ROUNDS)
    assert cfg.data.groups_per_step == 4  # 12 prompts / 3 updates
    assert total_steps(cfg, 0) == 15  # 5 rounds x 3 updates
    assert load("data.groups_per_step=6", "rollout.updates_per_round=5", text=ROUNDS).data.groups_per_step == 6


@pytest.mark.parametrize(
    ("epochs", "num_records", "steps"),
    [("1", 16, 2), ("2", 20, 5), ("0.5", 32, 2), ("1", 15, 1), ("1", 3, 1), ("0.29", 800, 29)],
)
def test_epochs_as_steps_of_eight_groups(load, epochs: str, num_records: int, steps: int):
    # 0.29 x 800 = 232 = 29 x 8, but 0.29 * 800 in binary is 231.99999999999997.
    assert total_steps(load("run.steps=null", f"run.epochs={epochs}"), num_records) == steps


BAD = [
    # override, then what the line must hold: the field, the value and what is allowed
    ("run.sed=1", "run.sed is not a known key; did you mean seed?; must be one of deterministic, dir,"),
    ("optimizer.schedule.warmup=1", "optimizer.schedule.warmup is not a known key; did you mean warmup_steps?"),
    ("trainer.lr=1", "trainer is not a known key", "must be one of checkpoint, data, engine"),
    ("loss.bta=1", "loss.bta is not a known key; did you mean beta?"),
    (
        "loss.name=ppo",
        "loss.name is 'ppo'",
        "must be one of dpo, epa, grpo, gvpo, orpo, poft, rloo, sft, simpo, or module:function",
    ),
    ("loss.beta=-1.0", "loss.beta is -1.0", "greater than 0"),
    ("loss=gvpo", "loss", "must be one of dpo, epa"),
    ("loss.name=gvop", "loss.name is 'gvop'; did you mean gvpo?; must be one of dpo"),
    ("loss.name=ipo", "loss.name is 'ipo'; did you mean dpo with variant: ipo?; must be one of dpo"),
    ("loss.name=dr_grpo", "loss.name is 'dr_grpo'; did you mean grpo with variant: dr_grpo?; must be one of dpo"),
    ("loss.name=dapo", "loss.name is 'dapo'; did you mean grpo with variant: dapo?; must be one of dpo"),
    ("loss.name=tests", "loss.name is 'tests'; that is a module, must be tests:function; must be one of dpo"),
    (
        "data.sources=[{pth: a}]",
        "data.sources.0.pth is not a known key; did you mean path?; must be one of path, weight",
    ),
    ("data.filter={teacher_score: 0.5}", "data.filter.teacher_score is not a known key; did you mean teacher_score_"),
    (
        "teachers=[{nam: a, path: b}]",
        "teachers.0.nam is not a known key; did you mean name?; must be one of name, path",
    ),
    ("engine.zero.stag=1", "engine.zero.stag is not a known key; did you mean stage?"),
    ("optimiser.lr=1", "optimiser is not a known key; did you mean optimizer?"),
    ("lr=1", "lr is not a known key; did you mean optimizer.lr?"),
    ("run.seed=abc", "run.seed is 'abc'", "valid integer"),
    ("run.seed=1.5", "run.seed is 1.5", "valid integer"),
    ("run.steps=0", "run.steps is 0", "greater than 0"),
    ("run.steps=true", "run.steps is True", "valid integer"),
    ("run.steps=null", "run.steps is missing", "run.epochs"),
    ("run.epochs=2", "run.epochs is 2.0", "run.steps is 7"),
    ("run.dtype=fp16", "run.dtype is 'fp16'", "must be 'bf16' or 'fp32'"),
    ("run.max_pass_gap=big", "run.max_pass_gap is 'big'", "must be a valid number or 'auto'"),
    ("run.dump_steps=[1, 0]", "run.dump_steps.1 is 0", "greater than 0"),
    ("run=3", "run is 3", "must be a section with keys dir, seed"),
    ("run.seed.x=3", "override 'run.seed.x=3'", "run.seed is 1, which has no keys"),
    ("run.dir=", "run.dir is None", "valid string"),
    ("data.max_length=null", "data.max_length is None", "valid integer"),
    ("data.path=null", "data.path is missing", "data.sources"),
    ("data.groups_per_step=null", "data.groups_per_step is missing", "required without a rollout"),
    ("data=null", "data is None", "must be a section with keys path, sources"),
    ("model.aux_loss_coefficient=-0.01", "model.aux_loss_coefficient is -0.01", "greater than or equal to 0"),
    ("optimizer.lr=-1e-6", "optimizer.lr is -1e-06", "greater than or equal to 0"),
    ("optimizer.lr=.nan", "optimizer.lr is nan", "finite"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0", "less than 1"),
    ("optimizer.betas=[0.9]", "optimizer.betas", "required"),
    ("optimizer.schedule.min_lr=1e-3", "optimizer.schedule.min_lr is 0.001", "at most optimizer.lr 1e-06"),
    ("parallel.tensor=0", "parallel.tensor is 0", "greater than 0"),
    ("parallel.context=0", "parallel.context is 0", "greater than 0"),
    ("parallel.expert=1.5", "parallel.expert is 1.5", "valid integer"),
    ("lora={rank: 8}", "lora.alpha is missing", "required"),
    ("lora={rank: 0, alpha: 16}", "lora.rank is 0", "greater than 0"),
    ("lora={rank: 8, alpha: 16, targets: [qkv]}", "lora.targets.0 is 'qkv'", "must be 'q_proj'"),
    ("lora={rank: 8, alpha: 16, targets: []}", "lora.targets is []", "at least 1"),
    ("lora={rank: 8, alpha: 16, targets: [q_proj, q_proj]}", "lora.targets", "once"),
    ("engine.name=fsdp", "engine.name is 'fsdp'", "must be 'megatron' or 'deepspeed'"),
    ("engine.head_kernel=triton", "engine.head_kernel is 'triton'", "must be 'auto', 'torch' or 'compiled'"),
    ("engine.zero.stage=3", "engine.zero", "stage=3", "only engine.name deepspeed reads it"),
    ("engine.deepspeed_config.a=1", "engine.deepspeed_config is {'a': 1}", "only engine.name deepspeed reads it"),
    ("engine.megatron.hidden_dropout=0.1", "engine.megatron.hidden_dropout is 0.1", "dropout must be 0"),
    ("engine.megatron.num_layers=4", "engine.megatron.num_layers is 4", "config.json in model.path"),
    ("engine.megatron.moe_router_topk=4", "engine.megatron.moe_router_topk is 4", "config.json in model.path"),
    ("engine.megatron.moe_expert_capacity_factor=1.0", "capacity_factor is 1.0", "megalign sets it itself"),
    ("engine.megatron.num_layers_in_first_pipeline_stage=1", "pipeline_stage is 1", "pipeline_model_parallel_layout"),
    ("engine.megatron.context_parallel_size=2", "context_parallel_size is 2", "set it with parallel.context"),
    ("checkpoint.allow=[3]", "checkpoint.allow.0 is 3", "string"),
    ("reference.source=none", "reference.source is 'none'", "must be initial, round_start or"),
    ("reference.source=intial", "reference.source is 'intial'", "none, round_start, hf://org/name or an existing"),
    ("reference.cache_dir=c", "reference.cache_dir is 'c'", "must be null"),
    ("teachers=[{name: a, path: b}]", "teachers has 1", "loss.name one of: poft"),
    ("teachers=[{name: a}]", "teachers.0.path is missing"),
    ("eval.every=5", "eval.path is missing", "eval.every is 5"),
    ("export.every=5", "export.hf_dir is missing", "export.every is 5"),
    ("trackers=[mlflow]", "trackers.0 is 'mlflow'", "must be 'tensorboard' or 'wandb'"),
    ("watchdog.timeout_s=0", "watchdog.timeout_s is 0", "greater than 0"),
    ("run.seed", "override 'run.seed'", "must look like key.sub=value"),
    (" run.seed=1", "override ' run.seed=1'", "must look like key.sub=value, without blanks"),
    ("run.seed =1", "override 'run.seed =1'", "must look like key.sub=value, without blanks"),
    ("run..seed=1", "override 'run..seed=1'", "must look like key.sub=value"),
    ("run.dump_steps=[1", "override 'run.dump_steps=[1'", "not valid YAML"),
]


@pytest.mark.parametrize(("override", "parts"), [(bad[0], bad[1:]) for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_value_is_one_line(load, override: str, parts: tuple[str, ...]):
    with pytest.raises(UserError) as raised:
        load(override, text=SMALLEST.replace("steps: 7", "steps: 7, seed: 1"))
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    assert message.startswith("command line: ")


BAD_ROUNDS = [
    ("data.path=a.jsonl", "data.path is 'a.jsonl'", "left out with a rollout section"),
    ("data.sources=[{path: a}]", "data.sources is", "left out with a rollout section"),
    ("run.steps=3", "run.steps is 3", "rollout.rounds x rollout.updates_per_round"),
    ("run.epochs=1", "run.epochs is 1", "rollout.rounds x rollout.updates_per_round"),
    ("rollout.updates_per_round=5", "rollout.updates_per_round is 5", "must divide rollout.prompts_per_round 12"),
    ("rollout.k=1", "rollout.k is 1", "at least 2"),
    ("rollout.temperature=0", "rollout.temperature is 0", "greater than 0"),
    ("rollout.max_new_tokens=128", "rollout.max_new_tokens is 128", "below data.max_length 128"),
    ("rollout.reward=null", "rollout.reward is None", "valid string"),
    ("rollout={path: p}", "rollout.rounds is missing"),
    ("loss={name: sft}", "loss.name is 'sft'", "does not use rewards"),
]


@pytest.mark.parametrize(("override", "parts"), [(bad[0], bad[1:]) for bad in BAD_ROUNDS])
def test_bad_rounds(load, override: str, parts: tuple[str, ...]):
    with pytest.raises(UserError) as raised:
        load(override, text=ROUNDS)
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds None"),
        ("- run", "holds ['run']"),
        ("run: {dir: a}\nmodel: {path: b}\nrun: {dir: c}\n", "line 3: key run is given twice, first in line 1"),
        ("run: {dir: a, dir: b}", "line 1: key dir is given twice"),
        ("run: [", "line 1: not valid YAML"),
        ("1: 2", "line 1: key is 1"),
        ("run: !!python/object/apply:os.getpid []", "line 1: not valid YAML"),
        ("run: {dir: a}", "model is missing; it is required; so are data, loss, optimizer"),
        ("run: !!int x", "not valid YAML: "),
        ("run: !!bool x", "not valid YAML: "),
        ("run: !!timestamp x", "not valid YAML: "),
        ("run: " + "9" * 5000, "not valid YAML: "),
        ("run: " + "[" * 3000, "not valid YAML: "),
        ("run: &a {dir: b, sub: *a}", "a section contains itself"),
    ],
)
def test_bad_files(load, text: str, expected: str):
    with pytest.raises(UserError, match="job.yaml: ") as raised:
        load(text=text)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(str(tmp_path / "none.yaml"), [])


MODEL = ModelConfig(
    family="llama",
    num_layers=6,
    hidden_size=48,
    ffn_size=96,
    num_heads=12,
    num_kv_heads=4,
    head_dim=4,
    vocab_size=300,  # padded to 384
    max_positions=64,
    norm_eps=1e-5,
    rope=Rope(1e4, 4),
)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "ranks"), [(1, 1, 1), (2, 1, 2), (4, 3, 12), (2, 2, 8), (1, 6, 6), (1, 4, 4)]
)
def test_layouts_that_fit(load, tensor: int, pipeline: int, ranks: int):
    layout = layout_of(load(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"))
    assert refusal(layout, MODEL, ranks) is None


@pytest.mark.parametrize(
    ("tensor", "pipeline", "ranks", "parts"),
    [
        (2, 1, 3, ("2 x 1 x 1 = 2", "ranks 3", "one of 1, 3")),
        (4, 1, 2, ("parallel.tensor", "ranks 2", "one of 1, 2")),
        (2, 2, 6, ("2 x 2 x 1 = 4", "one of 1, 2, 3, 6")),
        (3, 1, 3, ("parallel.tensor is 3", "key-value heads 4", "fit this model: 1, 2, 4")),
        (8, 1, 8, ("parallel.tensor is 8", "attention heads 12", "fit this model: 1, 2, 4")),
        (1, 7, 7, ("parallel.pipeline is 7", "at most the model's layers 6", "nearest layouts of 7 ranks", "data 7")),
    ],
)
def test_layouts_that_do_not(load, tensor: int, pipeline: int, ranks: int, parts: tuple[str, ...]):
    told = str(refusal(layout_of(load(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}")), MODEL, ranks))
    assert [part for part in parts if part not in told] == [], told


def test_border_writes_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refuse() -> int:
        raise UserError("job.yaml: run.seed is 'a':\nmust be a number")

    run_dir = tmp_path / "run"
    assert guarded(refuse, lambda: str(run_dir)) == 2
    line = "job.yaml: run.seed is 'a': must be a number"
    assert capsys.readouterr().err == f"megalign: error: {line}\n"
    assert [path.name for path in run_dir.iterdir()] == ["status.json"]
    assert json.loads((run_dir / "status.json").read_text()) == {"code": 2, "reason": line, "step": None}
    write_status(run_dir, 75, "SIGTERM", 12)
    assert json.loads((run_dir / "status.json").read_text()) == {"code": 75, "reason": "SIGTERM", "step": 12}
    assert guarded(lambda: 0) == 0


def test_run_dir_is_known_even_where_the_rest_is_wrong(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("run: {dir: runs/a, sed: 1}\n")
    assert hinted_run_dir(str(path)) == "runs/a"
    assert hinted_run_dir(str(path), ["nonsense", "run.dir=runs/b"]) == "runs/b"
    path.write_text("model: {path: x}\n")
    assert hinted_run_dir(str(path)) is None
    path.write_text("run: [\n")
    assert hinted_run_dir(str(path)) is None


@pytest.mark.parametrize(
    "path",
    [
        "/x/trial #2", "a: b", "'tis", '"', '"both"', "[x", "{x}", "*star", "&a", "!x", "%d", "@x", "`x`", "- x", "? x",
        "123", "1.5", "1e3", "true", "yes", "none", "2026-01-01", "12:30", "0x10", "x,y", "x\\n", "|", ">", "a=b",
        " a ", "run=1", "#1", "a #", "{a}: [",
    ],
)  # fmt: skip
def test_text_is_taken_as_it_stands(load, path: str):
    cfg = load(f"run.dir={path}", f"model.path={path}", f"data.path=./{path}", f"export.hf_dir=./{path}")
    assert (cfg.run.dir, cfg.model.path, cfg.data.path, cfg.export.hf_dir) == (path, path, f"./{path}", f"./{path}")


def test_text_that_was_taken_is_the_hinted_directory_too(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("run: {dir: runs/a}\n")
    assert hinted_run_dir(str(path), ["run.dir=/x/trial #2"]) == "/x/trial #2"
    assert hinted_run_dir(str(path), ["run.dir=~/a: b"]) == str(Path.home() / "a: b")
    assert hinted_run_dir(str(path), ["run.dir=null"]) is None
    assert hinted_run_dir(str(path), ["run={dir: /x/y, seed: 3}"]) == "/x/y"


@pytest.mark.parametrize("nothing", ["null", "none", "None", ""])
def test_text_keys_that_may_be_nothing_can_be_unset(load, nothing: str):
    text = SMALLEST + "export: {hf_dir: there}\neval: {path: held_out}\n"
    cfg = load(f"export.hf_dir={nothing}", f"eval.path={nothing}", text=text)
    assert (cfg.export.hf_dir, cfg.eval.path) == (None, None)


def test_numbers_words_lists_and_sections_are_yaml_still(load):
    cfg = load(
        "run.seed=3 # three",
        "optimizer.clip_norm=0.5",
        "run.max_minutes=none",
        "engine.chunk_tokens=64",
        "run.max_pass_gap=auto",
        "engine.tp_invariant=yes",
        "run.dump_steps=[1, 2]",
        "lora={rank: 8, alpha: 16, targets: [q_proj]}",
        "optimizer.schedule={name: cosine, warmup_steps: 2}",
        "trackers=[tensorboard]",
        "engine.megatron.overlap_grad_reduce=true",
    )
    assert (cfg.run.seed, cfg.optimizer.clip_norm, cfg.run.max_minutes, cfg.engine.chunk_tokens) == (3, 0.5, None, 64)
    assert cfg.run.max_pass_gap == "auto" and cfg.engine.tp_invariant and cfg.run.dump_steps == [1, 2]
    assert cfg.lora is not None and cfg.lora.targets == ["q_proj"]
    assert cfg.optimizer.schedule.name == "cosine" and cfg.trackers == ["tensorboard"]
    assert cfg.engine.megatron == {"overlap_grad_reduce": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1:30", "1:30"), ("010", "010"), ("0o10", 8), ("0x10", 16), ("1_000", 1000), ("2026-01-01", "2026-01-01"),
     ("0", 0), ("-.5", -0.5), ("5.", 5.0), ("-.inf", float("-inf")), ("+3", 3)],
)  # fmt: skip
def test_numbers_are_what_they_look_like(text: str, value: object):
    parsed = parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


def test_home_directories_in_every_path(load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    paths = [
        "run.dir",
        "model.path",
        "data.path",
        "eval.path",
        "export.hf_dir",
        "reference.source",
        "checkpoint.resume",
    ]
    cfg = load(*(f"{path}=~/m" for path in paths))
    values = [cfg.run.dir, cfg.model.path, cfg.data.path, cfg.eval.path, cfg.export.hf_dir, cfg.reference.source]
    assert [*values, cfg.checkpoint.resume] == [str(tmp_path / "m")] * 7
    cfg = load("data.path=null", "data.sources=[{path: ~/m}]", "loss={name: poft}", "teachers=[{name: a, path: ~/m}]")
    assert cfg.data.sources is not None
    assert [cfg.data.sources[0].path, cfg.teachers[0].path] == [str(tmp_path / "m")] * 2
    rounds = load("rollout.path=~/m", "run.dir=~", text=ROUNDS)
    assert rounds.rollout is not None
    assert (rounds.rollout.path, rounds.run.dir) == (str(tmp_path / "m"), str(tmp_path))
    assert load("run.dir=a/~/b", "model.path=hf://a/~b", "data.path=./~").run.dir == "a/~/b"
    assert load("run.dir=~root/x").run.dir == f"{Path('~root').expanduser()}/x"


SOURCES = [
    # the file's text, overrides, how the line begins, what it holds
    ("seed: x", [], "job.yaml: run.seed is 'x'", []),
    ("seed: 1", ["run.seed=x"], "command line: run.seed is 'x'", []),
    ("sed: 1", ["run.seed=x"], "job.yaml: run.sed is not a known key", ["command line: run.seed is 'x'"]),
    ("dir: 123", [], "job.yaml: run.dir is 123: must be a valid string", ["as text: '123', in quotes"]),
    ("seed: 1", ["lora={r: 8}"], "command line: lora.r is not a known key; did you mean rank?",
     ["lora.rank is missing; it is required; so is lora.alpha"]),
    ("seed: 1", ["lora.r=8"], "command line: lora.r is not a known key; did you mean rank?", ["lora.rank is missing"]),
    ("seed: 1", ["lora={lora_alpha: 8, rank: 1}"], "command line: lora.lora_alpha is", ["did you mean alpha?"]),
    ("seed: 1", ["optimizer.learning_rate=1"], "command line: optimizer.learning_rate is", ["did you mean lr?"]),
    ("lr: 1", [], "job.yaml: run.lr is not a known key", ["did you mean optimizer.lr?"]),
    ("seed: 1", ["epochs=1"], "command line: epochs is not a known key", ["did you mean run.epochs?"]),
    ("seed: 1", ["run.epochs=2"], "command line: run.epochs is 2.0", ["run.steps=null or run.epochs=null"]),
    ("epochs: 2", [], "job.yaml: run.epochs is 2.0", ["run.steps=null"]),
    ("seed: 1", ["eval.every=5"], "command line: eval.path is missing", []),
    ("seed: 1", ["reference.source=none"], "command line: reference.source is 'none'", []),
    ("seed: 1", ["run.dir=~nobody-has-this-name/x"], "command line: run.dir is '~nobody-has-this-name/x'", ["no user"]),
    ("seed: 1", ["model.path=a\rb"], "command line: model.path is 'a\\rb'", ["control characters"]),
    ("seed: 1", ["reference.source=Qwen/Qwen3-4B"], "command line: reference.source", ["hf://Qwen/Qwen3-4B"]),
    ("seed: 1", ["loss={name: gvpo, bta: 1, beta: x}"], "command line: loss.bta is not", ["loss.beta is 'x'"]),
    ("seed: 1", ["data.sources=[{path: a}]"], "command line: data.sources is", ["data.path=null"]),
    ("seed: 1", ["run.dir=" + "x" * 256], "command line: run.dir is 'xxx", ["255 bytes"]),
    ("seed: 1", ["trackers=wandb"], "command line: trackers is 'wandb'", ["must be a valid list, as in [wandb]"]),
    ("a: 1, b: 1, c: 1, d: 1, e: 1, f: 1, g: 1", [], "job.yaml: run.a is not a known key", ["; and 2 more"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "begin", "parts"), SOURCES)
def test_what_is_wrong_names_its_source(load, text: str, overrides: list[str], begin: str, parts: list[str]):
    dir_too = "" if text.startswith("dir") else "dir: runs/a, "
    with pytest.raises(UserError) as raised:
        load(*overrides, text=SMALLEST.replace("dir: runs/a, steps: 7", f"{dir_too}steps: 7, {text}"))
    message = str(raised.value)
    assert "\n" not in message and message[message.find("job.yaml") if begin.startswith("job") else 0 :].startswith(
        begin
    )
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("section", ["eval", "parallel", "engine", "checkpoint", "export", "watchdog", "reference"])
def test_null_unsets_a_section_that_has_defaults(load, section: str):
    assert load(f"{section}=null") == load()


def test_null_takes_a_section_back(load):
    given = ["eval.path=held_out.jsonl", "eval.every=5"]
    assert load(*given).eval.every == 5
    assert load(*given, "eval=null") == load()
