"""Prompts of rounds that are conversations: tools, arguments of the template, and an answer that is begun already."""

import pytest

from tests.support.tiny_jobs import (
    metrics,
    read_lines,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t['function']['name'] + '?' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% if not loop.last or m['role'] == 'user' %}"
    "{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' + ('think' if thinking else '') }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
ASKED = [{"role": "user", "content": "1+1="}]
PROMPTS = {
    "plain": ({"prompt": ASKED}, "<user>1+1=<eos><assistant>"),
    "tools": ({"prompt": ASKED, "tools": [TOOL]}, "add?<user>1+1=<eos><assistant>"),
    "arguments": ({"prompt": ASKED, "chat_template_kwargs": {"thinking": True}}, "<user>1+1=<eos><assistant>think"),
    "prefill": ({"prompt": [*ASKED, {"role": "assistant", "content": "so "}]}, "<user>1+1=<eos><assistant>so "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    write_model(folder / "model", tokenizer=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("name", PROMPTS)
def test_a_response_follows_what_the_template_makes_of_the_record(name, folder, tmp_path):
    record, text = PROMPTS[name]
    sections = round_sections(tmp_path, rounds=1, prompts_per_round=1, updates_per_round=1)
    write_lines(tmp_path / "prompts.jsonl", [{**record, "bonus": 0}])
    config = write_config(tmp_path, model={"path": str(folder / "model")}, **sections)
    assert train(config, "run.dump_steps=[1]", "data.max_length=48") == 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dumped = read_lines(tmp_path / "run" / "steps" / "step_1.jsonl")
    assert {tokenizer.decode(line["prompt_ids"]) for line in dumped} == {text}
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "1+1=", "tools": [TOOL]}, "tools"),
        ({"prompt": ASKED, "tools": "add"}, "tools"),
        ({"prompt": ASKED, "chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
def test_what_would_be_dropped_is_refused(record, told, folder, tmp_path):
    sections = round_sections(tmp_path, rounds=1, prompts_per_round=1, updates_per_round=1)
    write_lines(tmp_path / "prompts.jsonl", [{**record, "bonus": 0}])
    assert train(write_config(tmp_path, model={"path": str(folder / "model")}, **sections)) == 2
    reason = status(tmp_path / "run")["reason"]
    assert "prompts.jsonl:1: " in reason and told in reason
