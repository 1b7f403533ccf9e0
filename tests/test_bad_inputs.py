"""What a user gets wrong: one line that says where, which value and what is allowed; code 2; nothing left behind.

The cases of one configuration key each are in test_config.py and test_check.py; here whole jobs are started.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.processes import on_two_ranks, run_ranks
from tests.support.tiny_jobs import (
    TEMPLATE,
    VOCAB_SIZE,
    records,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
    write_tokenizer,
)

PROMPT = {"prompt_ids": [5, 6]}
SIDES = ("chosen", "rejected")


def answers(*rewards: object, ids: object = (7, 8)) -> dict[str, object]:
    responses = [{"response_ids": list(ids) if isinstance(ids, tuple) else ids, "reward": reward} for reward in rewards]
    return {**PROMPT, "responses": responses}


def sampled(temperature: object) -> dict[str, object]:
    """A group with log-probs of a sampler of that temperature."""
    responses = [{"response_ids": [7], "logp": [-1.0], "reward": reward} for reward in (0, 1)]
    return {**PROMPT, "responses": responses, "temperature": temperature}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Checkpoints and directories, right and damaged, that no case writes to."""
    folder = tmp_path_factory.mktemp("shared")
    write_model(folder / "model")
    write_model(folder / "speaks", tokenizer=True)
    write_model(folder / "wider", vocab_size=60, tokenizer=True)
    write_model(folder / "thinner", hidden_size=16)
    for name in ("cut", "unknown", "no_config", "lacking"):
        shutil.copytree(folder / "model", folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    about = json.loads((folder / "model" / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps(about | {"architectures": ["GPT2LMHeadModel"]}))
    (folder / "lacking" / "config.json").write_text(json.dumps(about | {"num_hidden_layers": 3}))
    (folder / "no_config" / "config.json").unlink()
    shutil.copytree(folder / "speaks", folder / "bad_tokenizer")
    (folder / "bad_tokenizer" / "tokenizer.json").write_text("{")
    write_model(folder / "narrow", vocab_size=40, tokenizer=True)
    write_model(folder / "few", vocab_size=3, tokenizer=True)
    asks = TEMPLATE.replace("'<'", "'?<'").replace("%}<assistant>", "%}?<assistant>")  # each turn begins with a "?"
    write_tokenizer(write_model(folder / "asks", vocab_size=44), template=asks)
    shutil.copytree(folder / "speaks", folder / "endless")
    (folder / "endless" / "generation_config.json").write_text('{"eos_token_id": [0, 200]}')
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, file in {"lfs": "model.safetensors", "lfs_words": "tokenizer.json", "lfs_config": "config.json"}.items():
        shutil.copytree(folder / "speaks", folder / name)
        (folder / name / file).write_text(pointer)
    (folder / "empty").mkdir()
    write_lines(folder / "data.jsonl", records("samples"))
    write_lines(folder / "singles.jsonl", records("singles"))
    write_lines(folder / "texts.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    write_lines(folder / "prompts.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2="}])
    (folder / "file").write_text("in the way")
    write_lines(folder / "tool_prompts.jsonl", [{"prompt": [ASKED], "tools": [TOOL], "answer": "2"}])
    write_lines(folder / "mood_prompts.jsonl", [{"prompt": [{**ASKED, "mood": "good"}], "answer": "2"}])
    _write_templates(folder)
    _write_checkpoints(folder)
    return folder


def _write_templates(folder: Path) -> None:
    """Models whose chat templates cannot be used: a list without a default, one that fails, one that is not valid."""
    for name, template in (("failing", "{{ messages[0].content + 1 }}"), ("unparsed", "{% if %}"), ("listed", "")):
        shutil.copytree(folder / "speaks", folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    (folder / "listed" / "chat_template.jinja").unlink()
    settings = folder / "listed" / "tokenizer_config.json"
    listed = {"chat_template": [{"name": "rag", "template": "{{ documents }}"}]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | listed))


def _write_checkpoints(folder: Path) -> None:
    """`trained`/checkpoints of a run, and copies with one thing wrong with them."""
    folder.joinpath("trained").mkdir()
    job = write_config(
        folder / "trained",
        model={"path": str(folder / "model")},
        data={"path": str(folder / "data.jsonl")},
        run={"steps": 1},
        checkpoint={"every": 1},
    )
    assert train(job) == 0
    shutil.move(folder / "trained" / "run" / "checkpoints", folder / "checkpoints")
    whole = folder / "checkpoints" / "step_00000001"
    for name in ("short", "foreign"):
        shutil.copytree(whole, folder / name)
    piece = next((folder / "short").glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])
    shutil.rmtree(folder / "foreign" / "hf")
    (folder / "lost").mkdir()
    (folder / "lost" / "latest").write_text('{"checkpoint": "step_00000007"}')


GVPO: dict[str, object] = {}
SFT = {"loss": {"name": "sft"}, "data": {"path": "{shared}/singles.jsonl"}}
POFT = {"loss": {"name": "poft"}, "data": {"path": "{shared}/singles.jsonl"}}
ROUNDS = {
    "model": {"path": "{shared}/speaks"},
    "run": {"steps": None},
    "data": {"path": None, "groups_per_step": None},
    "rollout": {
        "path": "{shared}/prompts.jsonl",
        "rounds": 1,
        "prompts_per_round": 2,
        "k": 2,
        "max_new_tokens": 4,
        "updates_per_round": 1,
        "reward": "exact_match",
    },
}
SPEAKS = SFT | {"model": {"path": "{shared}/speaks"}}
ASKED, ANSWERED = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
SAID: dict[str, object] = {"messages": [ASKED, ANSWERED]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
# name: (what the configuration changes, overrides, lines of data or None, parts of the line)
CASES: dict[str, tuple[dict, list[str], list | None, list[str]]] = {
    # configuration
    "unknown key": ({}, ["run.step=3"], None, ["command line: run.step is not a known key", "did you mean steps"]),
    "unknown section": ({}, ["optimiser.lr=1"], None, ["optimiser is not a known key", "optimizer"]),
    "wrong type": ({}, ["optimizer.lr=fast"], None, ["optimizer.lr is 'fast'", "number"]),
    "out of range": ({}, ["run.steps=0"], None, ["run.steps is 0", "greater than 0"]),
    "missing key": ({"data": {"max_length": None}}, [], None, ["data.max_length is missing"]),
    "unknown loss": ({}, ["loss.name=ppo"], None, ["loss.name is 'ppo'", "gvpo"]),
    "field of another loss": ({}, ["loss.clip=0.2"], None, ["loss.clip is not a known key", "beta"]),
    "override without value": ({}, ["run.steps"], None, ["override 'run.steps'", "key.sub=value"]),
    "needed reference refused": ({}, ["reference.source=none"], None, ["reference.source is 'none'", "gvpo"]),
    "dropout": ({}, ["engine.megatron.hidden_dropout=0.1"], None, ["engine.megatron.hidden_dropout is 0.1", "0"]),
    "unknown Megatron key": ({}, ["engine.megatron.overlap=1"], None, ["engine.megatron.overlap", "not a known"]),
    # layouts
    "tensor above ranks": ({}, ["parallel.tensor=2"], None, ["parallel.tensor", "2", "number of ranks 1"]),
    "pipeline above ranks": ({}, ["parallel.pipeline=2"], None, ["parallel.pipeline", "number of ranks 1"]),
    "sequence without tensor": ({}, ["parallel.sequence=true"], None, ["parallel.sequence", "at least 2"]),
    # checkpoints
    "no model": ({}, ["model.path={shared}/absent"], None, ["model.path: ", "absent is not a directory"]),
    "model without config": ({}, ["model.path={shared}/no_config"], None, ["model.path", "no config.json"]),
    "unknown architecture": ({}, ["model.path={shared}/unknown"], None, ["architectures", "GPT2LMHeadModel", "Llama"]),
    "weights cut short": ({}, ["model.path={shared}/cut"], None, ["model.path", "not a complete safetensors file"]),
    "layer missing": ({}, ["model.path={shared}/lacking"], None, ["model.layers.2", "is missing"]),
    "broken tokenizer": ({}, ["model.path={shared}/bad_tokenizer"], None, ["tokenizer cannot be loaded"]),
    "reference of other words": ({}, ["reference.source={shared}/wider"], None, ["reference.source", "60", "53"]),
    "reference not there": ({}, ["reference.source={shared}/absent"], None, ["reference.source", "initial", "absent"]),
    # records
    "no data file": ({}, ["data.path={shared}/absent.jsonl"], None, ["data.path", "absent.jsonl", "no such file"]),
    "empty data file": ({}, [], [], ["data.path", "no records"]),
    "not JSON": ({}, [], ["{"], ["data.jsonl:1", "not valid JSON"]),
    "unknown field": ({}, [], [answers(1, 0) | {"answer": 3}], ["data.jsonl:1: field answer is not", "responses"]),
    "NaN reward": ({}, [], [answers(1, 0), answers(1, float("nan"))], ["data.jsonl:2", "responses[1].reward is nan"]),
    "reward missing": ({}, [], [{**PROMPT, "responses": [{"response_ids": [3]}] * 2}], ["data.jsonl:1", "reward"]),
    "one response": ({}, [], [answers(1)], ["data.jsonl:1", "responses", "two or more"]),
    "empty response": ({}, [], [answers(1, 0, ids=())], ["data.jsonl:1", "response_ids is []"]),
    "token id outside": ({}, [], [answers(1, 0, ids=[VOCAB_SIZE])], ["data.jsonl:1", str(VOCAB_SIZE), "below"]),
    "too long": ({}, ["data.max_length=3"], None, ["data.jsonl:1", "tokens long", "at most 3"]),
    "text without tokenizer": (SFT, [], [{"prompt": "a", "completion": "b"}], ["data.jsonl:1", "no tokenizer"]),
    "pairs, no rewards": ({}, [], [{**PROMPT, "chosen_ids": [1], "rejected_ids": [2]}], ["data.jsonl:1", "rewards"]),
    "equal rewards for DPO": ({"loss": {"name": "dpo"}}, [], [answers(1, 1)], ["data.jsonl:1", "reward"]),
    "teacher scores missing": (POFT, [], None, ["singles.jsonl:1", "teacher_scores is missing"]),
    "teacher not there": (POFT, ["teachers=[{{name: a, path: {shared}/absent}}]"], None, ["teachers.0.path", "absent"]),
    "teacher reads text, records are ids": (
        POFT, ["teachers=[{{name: a, path: {shared}/speaks}}]"], None, ["singles.jsonl:1", "prompt_ids", "token ids"],
    ),
    "teacher of fewer words": (
        POFT | {"model": {"path": "{shared}/wider"}},
        ["teachers=[{{name: a, path: {shared}/model}}]"],
        [{"prompt_ids": [59], "response_ids": [3]}],
        ["data.jsonl:1", "token id 59", "below 53", "teachers.0.path"],
    ),
    "held-out file": ({}, ["eval.path={shared}/absent", "eval.every=1"], None, ["eval.path", "absent", "no such file"]),
    # records of other programs
    "Git LFS pointer as data": (
        SFT, [], ["version https://git-lfs.github.com/spec/v1", "oid sha256:4d7a", "size 12"],
        ["data.path", "data.jsonl", "Git LFS pointer", "git lfs pull"],
    ),
    "one object over several lines": (
        SFT, [], ["{", '"data": [', "{}]}"], ["data.path", "one JSON object over several lines", "'data'"],
    ),
    "HH-RLHF strings": (
        {"loss": {"name": "dpo"}}, [], [{side: f"\n\nHuman: q\n\nAssistant: {side}" for side in SIDES}],
        ["data.jsonl:1", "prompt is missing", "dialogues as strings", "the rest"],
    ),
    "question and answer": (
        SFT, [], [{"question": "1", "answer": "2"}] * 3,
        ["data.jsonl:1", "rename question to prompt and answer to completion", "the same in 2 of the 2 other"],
    ),
    "a call in ShareGPT": (
        SFT, [], [{"conversations": [{"from": "human", "value": "1"}, {"from": "function_call", "value": "{}"}]}],
        ["data.jsonl:1", "conversations[1].from is 'function_call'", "tool_calls"],
    ),
    "several faults at once": (
        {}, [], [{"promt": "1", "id": 3, "responses": [{"text": "a", "reward": "1"}, {"text": "", "reward": 0}]}],
        ["promt, id are not known", "also: field prompt is missing", "reward is '1'", "responses[1].text is ''"],
    ),
    # resume, export, trackers, places
    "nothing to resume": ({}, ["checkpoint.resume={shared}/empty"], None, ["checkpoint.resume", "no checkpoint"]),
    "resume not there": ({}, ["checkpoint.resume={shared}/absent"], None, ["checkpoint.resume", "absent"]),
    "checkpoint of another model": (
        {}, ["checkpoint.resume={shared}/checkpoints", "model.path={shared}/thinner"], None,
        ["step_00000001", "hidden_size 32", "16"],
    ),
    "checkpoint cut short": ({}, ["checkpoint.resume={shared}/short"], None, [".distcp is", "bytes"]),
    "checkpoint of another program": ({}, ["checkpoint.resume={shared}/foreign"], None, ["hf/config.json is missing"]),
    "latest points nowhere": ({}, ["checkpoint.resume={shared}/lost"], None, ["latest", "step_00000007", "none"]),
    "export over other files": ({}, ["export.hf_dir={shared}/checkpoints"], None, ["checkpoints"]),
    "tracker not installed": ({}, ["trackers=[wandb]"], None, ["trackers", "wandb", "pip install wandb"]),
    # rounds
    "prompt without an answer": (ROUNDS, [], None, ["prompts.jsonl:2", "answer"]),
    "unknown reward": (ROUNDS, ["rollout.reward=best"], None, ["rollout.reward is 'best'", "exact_match"]),
    "reward module": (ROUNDS, ["rollout.reward=nowhere:at_all"], None, ["rollout.reward", "nowhere"]),
    "rounds without tokenizer": (ROUNDS, ["model.path={shared}/model"], None, ["tokenizer", "rounds need one"]),
    "steps beside rounds": (ROUNDS, ["run.steps=3"], None, ["run.steps is 3", "rollout"]),
    "updates do not divide": (ROUNDS, ["rollout.updates_per_round=3"], None, ["rollout.updates_per_round is 3"]),
    # files of which a clone has pointers only
    "pointer as weights": (
        {}, ["model.path={shared}/lfs"], None,
        ["model.path: ", "lfs/model.safetensors is a Git LFS pointer, not the file of 12345 bytes", "git lfs pull"],
    ),
    "pointer as tokenizer": ({}, ["model.path={shared}/lfs_words"], None, ["tokenizer.json is a Git LFS pointer"]),
    "pointer as configuration": ({}, ["model.path={shared}/lfs_config"], None, ["config.json is a Git LFS pointer"]),
    "pointer as reference": ({}, ["reference.source={shared}/lfs"], None, ["reference.source: ", "Git LFS pointer"]),
    # tokens that the tokenizer or a setting has and the model lacks
    "text beyond the vocabulary": (
        SFT, ["model.path={shared}/narrow"], [{"prompt": "1+1=", "completion": "2?"}],
        ["data.jsonl:1", "completion becomes token id 44, the tokenizer's '?'", "below the model's 40"],
    ),
    "template beyond the vocabulary": (
        SFT, ["model.path={shared}/asks"],
        [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}],
        ["data.jsonl:1", "becomes token id 44, the tokenizer's '?'", "below the model's 44"],
    ),
    "prompt beyond the vocabulary": (
        ROUNDS, ["model.path={shared}/few"], None, ["prompts.jsonl:1", "field prompt becomes token id", "below"],
    ),
    "end beyond the vocabulary": (
        ROUNDS, ["model.path={shared}/endless", "rollout.reward=tests.support.tiny_jobs:digits"], None,
        ["generation_config.json: eos_token_id is [0, 200]", "below 53"],
    ),
    # another job's checkpoint, outputs that must fail
    "checkpoint of another rate": (
        {}, ["checkpoint.resume={shared}/checkpoints", "optimizer.lr=0.5"], None,
        ["step_00000001 is another job's: optimizer.lr was 0.001, is 0.5", "never", "checkpoint.allow=[optimizer.lr]"],
    ),
    "checkpoint of another loss": (
        {}, ["checkpoint.resume={shared}/checkpoints", "loss.name=rloo"], None,
        ["another job's", "loss.name was 'gvpo', is 'rloo'"],
    ),
    "checkpoint of other data": (
        {}, ["checkpoint.resume={shared}/checkpoints"], [answers(1, 0)],
        ["another job's: data.path was ", "(8 records, ", "data.jsonl (1 records, ", "checkpoint.allow=[data.path]"],
    ),
    "checkpoint of another seed and dtype": (
        {}, ["checkpoint.resume={shared}/checkpoints", "run.seed=7", "run.dtype=bf16"], None,
        ["run.seed was 0, is 7; run.dtype was 'fp32', is 'bf16'", "checkpoint.allow=[run.seed, run.dtype]"],
    ),
    "half of what differs is allowed": (
        {}, ["checkpoint.resume={shared}/checkpoints", "run.seed=7", "optimizer.eps=1", "checkpoint.allow=[run]"], None,
        ["optimizer.eps was 1e-05, is 1.0; must be", "checkpoint.allow=[run.seed, optimizer.eps]"],
    ),
    "unknown allowance": ({}, ["checkpoint.allow=[optimizer.rate]"], None, ["checkpoint.allow.0", "optimizer.lr"]),
    "export below a file": ({}, ["export.hf_dir={shared}/file/hf"], None, ["export.hf_dir", "Not a directory"]),
    "export nobody can make": ({}, ["export.hf_dir=/proc/none/hf"], None, ["export.hf_dir", "cannot be written"]),
    "export among checkpoints": (
        {}, ["export.hf_dir={{run.dir}}/checkpoints"], None, ["export.hf_dir", "run/checkpoints", "run's own files"],
    ),
    "export named by nothing": (
        {}, ["export.hf_dir={{run.name}}/hf"], None, ["export.hf_dir", "{run.name} is no known", "{run.dir}"],
    ),
    # what overrides say, what keys are called, where things are looked for
    "keys of another program": ({}, ["lora={{r: 8}}"], None, ["line: lora.r is not", "mean rank?", "rank is missing"]),
    "keys of another program in the file": (
        {"lora": {"r": 8, "lora_alpha": 16}}, [], None, ["lora.r is not", "mean rank?", "mean alpha?"],
    ),
    "key in another section": ({}, ["optimizer.steps=3"], None, ["optimizer.steps is not", "did you mean run.steps?"]),
    "two mistakes": (
        {"run": {"sed": 1}}, ["optimizer.lr=fast"], None, ["job.yaml: run.sed is not", "command line: optimizer.lr is"],
    ),
    "epochs beside steps": ({}, ["run.epochs=2"], None, ["command line: run.epochs is 2.0", "run.steps=null"]),
    "data beside rounds": (ROUNDS, ["data.path={shared}/file"], None, ["command line: data.path is", "data.path=null"]),
    "word for a list": ({}, ["trackers=tensorboard"], None, ["command line: trackers is", "as in [tensorboard]"]),
    "number for a text": ({"model": {"path": 123}}, [], None, ["job.yaml: model.path is 123", "'123', in quotes"]),
    "number that begins with 0": ({}, ["run.seed=010"], None, ["command line: run.seed is '010'", "integer"]),
    "clock for a number": ({}, ["run.max_minutes=1:30"], None, ["command line: run.max_minutes is '1:30'", "number"]),
    "sign of a comment": ({}, ["data.path={shared}/data.jsonl #2"], None, ["data.jsonl #2", "no such file"]),
    "quotes of YAML": ({}, ['model.path="{shared}/model"'], None, ['model"', "is not a directory"]),
    "colon and blank": ({}, ["data.path={shared}/a: b"], None, ["data.path", "a: b'", "no such file"]),
    "nobody's home": ({}, ["data.path=~nobody-has-this-name/a"], None, ["line: data.path is", "no user's home"]),
    "name that no disk takes": ({}, [f"export.hf_dir={'x' * 256}"], None, ["line: export.hf_dir is", "255 bytes"]),
    "end of a line in a path": ({}, ["model.path=m\r"], None, ["line: model.path is", "control characters"]),
    "model by its name": ({}, ["model.path=Org/Name-7B"], None, ["model.path: Org/Name-7B", "hf://Org/Name-7B"]),
    "model by its address": ({}, ["model.path=https://huggingface.co/Org/Name"], None, ["Hub: hf://Org/Name"]),
    "reference by its name": ({}, ["reference.source=Org/Name"], None, ["line: reference.source", "hf://Org/Name"]),
    "reward module, where": (ROUNDS, ["rollout.reward=nowhere:f"], None, ["'nowhere'", "looked for in", "PYTHONPATH"]),
    "reward module inside another": (ROUNDS, ["rollout.reward=json.nowhere:f"], None, ["json.nowhere", "imported"]),
    # samples of another temperature, prompts and rewards of rounds
    "sampled at another temperature": (
        {"loss": {"name": "grpo"}}, [], [answers(1, 0), sampled(0.7)],
        ["data.jsonl:2", "field temperature is 0.7", "1, the training temperature", "responses[0].logp"],
    ),
    "sampled at another temperature, for RLOO": (
        {"loss": {"name": "rloo"}}, [], [sampled(1), sampled(1.5)], ["data.jsonl:2", "field temperature is 1.5"],
    ),
    "temperature of zero": ({}, [], [sampled(0)], ["data.jsonl:1", "field temperature is 0", "above 0"]),
    "temperature in words": ({}, [], [sampled("high")], ["data.jsonl:1", "field temperature is 'high'"]),
    "finished in words": (
        {}, [], [{**PROMPT, "responses": [{"response_ids": [3], "reward": 1, "finished": "yes"}] * 2}],
        ["data.jsonl:1", "responses[0].finished is 'yes'", "true or false"],
    ),
    "reward that is a number": (ROUNDS, ["rollout.reward=math:pi"], None, ["rollout.reward", "must be a function"]),
    "held-out prompts that are none": (
        ROUNDS | {"eval": {"path": "{shared}/file", "every": 1}},
        ["rollout.reward=tests.support.tiny_jobs:digits"],
        None,
        ["/file:1: ", "not valid JSON"],
    ),
    "every prompt bad and skipped": (
        ROUNDS, ["data.on_bad_record=skip", "rollout.reward=reasoning_gym"], None,
        ["no record of rollout.path is usable; the first problem: ", "prompts.jsonl:1", "metadata.source_dataset"],
    ),
}  # fmt: skip
# text that would become other tokens than meant
CASES |= {
    "tools that no template reads": (
        SPEAKS,
        [],
        [SAID | {"tools": [TOOL]}],
        ["data.jsonl:1: field tools: the chat template does not read them", "must be "],
    ),
    "tools beside a string": (
        SPEAKS,
        [],
        [{"prompt": "a", "completion": "b", "tools": [TOOL]}],
        ["data.jsonl:1: field tools is", "plain string"],
    ),
    "call that no template writes": (
        SPEAKS,
        [],
        [{"messages": [ASKED, CALL]}],
        ["data.jsonl:1: field messages: the chat template", "must be "],
    ),
    "field that no template reads": (
        SPEAKS,
        [],
        [{"messages": [ASKED, {**ANSWERED, "mood": "good"}]}],
        ["data.jsonl:1: field messages[1].mood is not known"],
    ),
    "variable that no template reads": (
        SPEAKS,
        [],
        [SAID | {"chat_template_kwargs": {"enable_thinking": False}}],
        ["data.jsonl:1: field chat_template_kwargs.enable_thinking", "does not read it"],
    ),
    "templates without a default": (
        SPEAKS,
        ["model.path={shared}/listed"],
        [SAID],
        ["data.jsonl:1: ", "a list (rag) without a default"],
    ),
    "template that fails": (
        SPEAKS,
        ["model.path={shared}/failing"],
        [SAID],
        ["data.jsonl:1: field messages: the chat template fails", "TypeError"],
    ),
    "template that is none": (
        SPEAKS,
        ["model.path={shared}/unparsed"],
        [SAID],
        ["data.jsonl:1: ", "is not valid (line 1"],
    ),
    "prompt with tools that no template reads": (
        ROUNDS,
        ["rollout.path={shared}/tool_prompts.jsonl"],
        None,
        ["tool_prompts.jsonl:1: field tools: the chat template does not read them"],
    ),
    "prompt with a field that no template reads": (
        ROUNDS,
        ["rollout.path={shared}/mood_prompts.jsonl"],
        None,
        ["mood_prompts.jsonl:1: field prompt[0].mood is not known"],
    ),
    "a day that is none": ({}, ["data.date=31.1.2026"], None, ["data.date is '31.1.2026'", "YYYY-MM-DD"]),
    "special tokens": ({}, ["data.special_tokens=all"], None, ["data.special_tokens is 'all'", "auto"]),
}


def filled(value, shared):
    """`{shared}` in every text of a configuration replaced."""
    if isinstance(value, dict):
        return {key: filled(inner, shared) for key, inner in value.items()}
    return value.format(shared=shared) if isinstance(value, str) else value


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_code_2(name, shared, tmp_path, capfd):
    changes, overrides, lines, parts = CASES[name]
    base = {"model": {"path": str(shared / "model")}, "data": {"path": str(shared / "data.jsonl")}}
    changes = filled(changes, shared)
    merged = {**changes, **{key: {**base[key], **changes.get(key, {})} for key in base}}
    if lines is not None:
        merged["data"]["path"] = str(tmp_path / "data.jsonl")
        write = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in write))
    config = write_config(tmp_path, **merged)
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}

    assert train(config, *[override.format(shared=shared) for override in overrides]) == 2

    out, err = capfd.readouterr()
    told = [line for line in err.splitlines() if line.startswith("megalign")]
    assert out == "" and len(told) == 1 and err.splitlines() == told, err
    assert told[0].startswith("megalign: error: ")
    for part in parts:
        assert part in told[0], told[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]
    assert status(tmp_path / "run") == {"code": 2, "reason": told[0].removeprefix("megalign: error: "), "step": None}
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "command line: "),
        (["trian", "job.yaml"], "trian"),
        (["train"], "config"),
        (["train", "{folder}/absent.yaml"], "absent.yaml: cannot be read"),
        (["train", "{folder}/list.yaml"], "list.yaml"),
        (["train", "{folder}/no_dir.yaml"], "run.dir is missing"),
        (["train", "{folder}/broken.yaml"], "broken.yaml: line 3"),
    ],
)
def test_without_a_run_directory_nothing_is_written(arguments, part, tmp_path, capfd, monkeypatch):
    from megalign.__main__ import main

    (tmp_path / "list.yaml").write_text("- run\n")
    (tmp_path / "no_dir.yaml").write_text("run: {steps: 1}\n")
    (tmp_path / "broken.yaml").write_text("run:\n  dir: [\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megalign: error: ") and part in err
    assert sorted(tmp_path.iterdir()) == before


def test_run_directory_that_is_a_file(shared, tmp_path, capfd):
    config = write_config(tmp_path, model={"path": str(shared / "model")}, data={"path": str(shared / "data.jsonl")})
    assert train(config, f"run.dir={shared}/file") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "run.dir is " in err and "must be a directory" in err
    assert (shared / "file").read_text() == "in the way"


def test_two_ranks_tell_once(shared, tmp_path):
    """Configuration, records, layout and checkpoint, one after another in one launch of two ranks."""
    config = write_config(tmp_path, model={"path": str(shared / "model")}, data={"path": str(shared / "data.jsonl")})
    wrong = ["run.step=3", "data.max_length=3", "parallel.tensor=3", f"checkpoint.resume={shared}/short"]
    done = on_two_ranks(tmp_path, [(["train", str(config), one], 2) for one in wrong])
    told = [line for line in done.splitlines() if "megalign:" in line]
    assert all(line.startswith("megalign: error: ") for line in told) and len(told) == 4, done
    for line, part in zip(told, ("run.step ", "data.jsonl:1", "parallel.tensor", ".distcp"), strict=True):
        assert part in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


def rollout_but_for_one_key(config: str) -> None:
    """Rank 1 of the job has a key that does not exist."""
    from megalign.__main__ import main

    wrong = ["run.step=3"] if os.environ["RANK"] == "1" else []
    assert main(["rollout", config, *wrong]) == 2


def test_configuration_that_is_wrong_on_one_rank(tmp_path):
    config = write_config(tmp_path, **round_sections(tmp_path))
    run_ranks(rollout_but_for_one_key, 2, str(config))
    assert "run.step is not a known key" in status(tmp_path / "run")["reason"]
