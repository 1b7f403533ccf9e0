"""Check that other programs' records are converted if unambiguous, else refused with what to write instead."""

import json

import pytest

from megalign.data.config import DataConfig
from megalign.data.dataset import load_dataset
from megalign.data.formats import recognise
from megalign.data.group import Pairing
from megalign.data.prompts import load_prompt_groups
from megalign.schema import UserError
from tests.support.toy_tokenizer import ASSISTANT, EOS, SYSTEM, USER, VOCAB_SIZE, assistant, ids_of, toy_tokenizer, user

SINGLE, SAMPLES, PREFERENCE = Pairing("single"), Pairing("samples"), Pairing("preference")
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
SYSTEM_TURN = {"role": "system", "content": "s"}
TALK = [user("q"), assistant("a")]
OTHER = [user("q"), assistant("b")]


def load(tmp_path, rows, pairing=SINGLE, tokenizer=None, **settings):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(path=str(path), max_length=99, tokens_per_micro_batch=99, **settings)
    return load_dataset(cfg, tokenizer or toy_tokenizer(), pairing=pairing, seed=0, vocab_size=VOCAB_SIZE)


def refusal(tmp_path, rows, pairing=SINGLE, **settings):
    with pytest.raises(UserError) as error:
        load(tmp_path, rows, pairing, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# (record, what it is rewritten to, how the log tells it)
READ = [
    ({"conversations": [HUMAN, GPT]}, {"messages": TALK}, "ShareGPT"),
    ({"id": "x_0", "conversations": [HUMAN, GPT]}, {"messages": TALK}, "ShareGPT, without id"),
    ({"system": "s", "conversations": [HUMAN, GPT]}, {"messages": [SYSTEM_TURN, *TALK]}, "ShareGPT"),
    ({"system": "", "conversations": [HUMAN, GPT]}, {"messages": TALK}, "ShareGPT"),
    ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, {"messages": [SYSTEM_TURN, *TALK]}, "ShareGPT"),
    ({"conversations": TALK}, {"messages": TALK}, "ShareGPT"),
    ({"messages": [{"role": "human", "content": "q"}, assistant("a")]}, {"messages": TALK}, "ShareGPT"),
    ({"conversation": TALK}, {"messages": TALK}, "ShareGPT"),
    ({"messages": [HUMAN, GPT]}, {"messages": TALK}, "ShareGPT"),
    ({"prompt": [HUMAN], "completion": [GPT]}, {"prompt": TALK[:1], "completion": TALK[1:]}, "ShareGPT"),
    (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]},
        "ShareGPT",
    ),
    ({"instruction": "q", "output": "a"}, {"prompt": TALK[:1], "completion": "a"}, "Alpaca"),
    ({"instruction": "q", "input": "", "output": "a"}, {"prompt": TALK[:1], "completion": "a"}, "Alpaca"),
    ({"instruction": "q", "input": "i", "output": "a"}, {"prompt": [user("q\ni")], "completion": "a"}, "Alpaca"),
    (
        {"instruction": "q", "input": "", "output": "a", "text": "Below ... q ... a"},
        {"prompt": TALK[:1], "completion": "a"},
        "Alpaca, without text",
    ),
    (
        {"instruction": "q", "output": "a", "system": "s", "history": [["h", "g"]]},
        {"prompt": [SYSTEM_TURN, user("h"), assistant("g"), user("q")], "completion": "a"},
        "Alpaca",
    ),
    (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
        "Alpaca",
    ),
    ({"prompt": "q", "chosen": TALK, "rejected": OTHER}, {"chosen": TALK, "rejected": OTHER}, "UltraFeedback's rows"),
    (
        {
            "prompt": "q",
            "prompt_id": "f0",
            "chosen": TALK,
            "rejected": OTHER,
            "messages": TALK,
            "score_chosen": 8.5,
            "score_rejected": 8.0,
        },
        {"chosen": TALK, "rejected": OTHER},
        "UltraFeedback's rows, without prompt_id, messages, score_chosen, score_rejected",
    ),
    (
        {"prompt": TALK[:1], "chosen": TALK, "rejected": OTHER},
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]},
        "whole conversations beside their prompt",
    ),
    (
        {"prompt": "q", "prompt_id": "f0", "messages": TALK},
        {"messages": TALK},
        "messages beside their prompt, without prompt_id",
    ),
    (
        {
            "input": {"messages": TALK[:1], "tools": [], "parallel_tool_calls": True},
            "preferred_output": TALK[1:],
            "non_preferred_output": OTHER[1:],
        },
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]},
        "OpenAI pairs, without input.parallel_tool_calls",
    ),
]
PART = [{"type": "text", "text": "q"}]
READ.append(
    ({"messages": [{"role": "user", "content": PART}, TALK[1]]}, {"messages": TALK}, "messages with text parts")
)


READ.append(({"conversations": [HUMAN, GPT], "tools": ""}, {"messages": TALK}, "ShareGPT, without tools"))


@pytest.mark.parametrize(("record", "ours", "told"), READ)
def test_read_in_the_one_way_there_is(record, ours, told, tmp_path):
    reading = recognise(record)
    assert (reading.record, reading.summary()) == (ours, told)
    pairing = PREFERENCE if "chosen" in ours else SINGLE
    data = load(tmp_path, [record, record], pairing)
    assert data.report.line() == f"2 of 2 records kept; 2 read as {told}"
    assert data.groups[0] == load(tmp_path, [ours], pairing).groups[0]


def test_tokens_of_the_three_most_common(tmp_path):
    asked = (USER, *ids_of("q"), EOS, ASSISTANT)
    end = (*ids_of("a"), EOS)
    rows = [{"conversations": [HUMAN, GPT]}, {"instruction": "q", "input": "", "output": "a"}]
    for group in load(tmp_path, rows).groups:
        assert (group.prompt_ids, group.responses[0].ids) == (asked, end)
    (group,) = load(tmp_path, [{"prompt": "q", "chosen": TALK, "rejected": OTHER}], PREFERENCE).groups
    assert (group.prompt_ids, [response.ids for response in group.responses]) == (asked, [end, (*ids_of("b"), EOS)])
    (group,) = load(tmp_path, [{"system": "s", "conversations": [HUMAN, GPT]}]).groups
    assert group.prompt_ids == (SYSTEM, *ids_of("s"), EOS, *asked)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK},
        {"prompt": "q", "completion": "a"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": TALK[1:], "rejected": OTHER[1:]},
        {"chosen": TALK, "rejected": OTHER},
        {"prompt": [user("q"), assistant("a"), user("q")], "chosen": TALK[1:], "rejected": OTHER[1:]},
        {"prompt": "q", "responses": [{"text": "a", "reward": 1}]},
        {"prompt_ids": [5], "response_ids": [6]},
    ],
)
def test_our_own_formats_are_left_alone(record):
    assert recognise(record).record == record and recognise(record).name == ""


def test_data_format_decides_what_a_row_is(tmp_path):
    row = {"prompt": "q", "chosen": TALK, "rejected": OTHER, "messages": TALK}
    assert load(tmp_path, [row], PREFERENCE, format="preference").groups[0].paired
    (group,) = load(tmp_path, [row], format="messages", extra_fields="ignore").groups
    assert len(group.responses) == 1
    row = {"instruction": "q", "output": "a", "prompt": "q:", "completion": "a"}
    assert "instruction, output are not known" in refusal(tmp_path, [row])


# (pairing, record, parts of the line)
REFUSED = [
    (
        PREFERENCE,
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ["field prompt is missing", "whole dialogues as strings", 'last "\\n\\nAssistant:"', '{"role": "user"'],
    ),
    (
        PREFERENCE,
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        },
        ["fields chosen and rejected are whole dialogues that begin with the field prompt", "must be what follows"],
    ),
    (
        PREFERENCE,
        {"prompt": "something else", "chosen": TALK, "rejected": OTHER},
        ["field prompt is 'something else'", "both chosen and rejected contain"],
    ),
    (
        PREFERENCE,
        {"prompt": "q", "chosen": TALK, "rejected": OTHER, "messages": OTHER},
        ["belong to different formats", "set data.format"],
    ),
    (SINGLE, {"prompt": "something else", "messages": TALK}, ["field prompt is 'something else'"]),
    (
        SINGLE,
        {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
        ["field conversations[1].from is 'function_call'", "tool_calls"],
    ),
    (SINGLE, {"conversations": [HUMAN, GPT, HUMAN]}, ["messages[2].role is 'user'", "read as ShareGPT"]),
    (
        SINGLE,
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a")]},
        ["field messages[0].content is [{'type': 'image'}]", "a string"],
    ),
    (SINGLE, {"conversations": []}, ["field conversations is not known", "rename conversations to messages"]),
    (SINGLE, {"conversations": ["q", "a"]}, ["field conversations is not known", "rename conversations to messages"]),
    (SINGLE, {"": 0, "prompt": "q", "completion": "a"}, ["field '' is not known"]),
    (SINGLE, {"conversations": [HUMAN, GPT], "lang": "en"}, ["field lang is not known", "read as ShareGPT"]),
    (SINGLE, {"instruction": "q", "input": 3, "output": "a"}, ["field input is 3", "a string"]),
    (SINGLE, {"instruction": "q", "input": "", "output": ""}, ["field output is ''"]),
    (SINGLE, {"instruction": "q", "output": "a", "history": ["h"]}, ["field history[0] is 'h'"]),
    (
        SINGLE,
        {"question": "q", "answer": "a"},
        ["fields answer, question are not known", "rename question to prompt and answer to completion"],
    ),
    (SINGLE, {"prompt": "q", "response": "a"}, ["field response is not known", "rename response to completion"]),
    (SINGLE, {"prompt": "q", "completion": ["a", "b"]}, ["field completion is ['a', 'b']", "several answers"]),
    (SINGLE, {"prompt": ["q"], "completion": "a"}, ["field prompt is ['q']", "a string or a list of messages"]),
    (SINGLE, {"text": "q a"}, ["field text is not known", '{"prompt": ..., "completion": ...}']),
    (SINGLE, {"input_ids": [1], "labels": [1]}, ["input_ids, labels are not known", '"prompt_ids": [...]']),
    (SINGLE, {"prompt": "q", "completion": "a", "label": True}, ["field label is not known", "labels become rewards"]),
    (SINGLE, {"data": [{"prompt": "q"}]}, ["the records under data are written one a line"]),
    (
        PREFERENCE,
        {"question": "q", "chosen": "a", "rejected": "b"},
        ["field question is not known", "rename question to prompt", "also: field prompt is missing"],
    ),
    (
        PREFERENCE,
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b"},
        ["rename chosen_response to chosen"],
    ),
    (SAMPLES, {"prompt": "q", "completions": ["a"], "rewards": [1]}, ["completions, rewards", '"responses": [{"text"']),
    (
        SAMPLES,
        {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 0]},
        [
            "field rewards is not known",
            "rewards are written beside their answers",
            "responses[0] is 'a'",
            "(and 1 more like it)",
        ],
    ),
]


@pytest.mark.parametrize(("pairing", "record", "parts"), REFUSED)
def test_what_could_mean_two_things_says_what_to_write(pairing, record, parts, tmp_path):
    message = refusal(tmp_path, [record], pairing)
    assert message.startswith(f"{tmp_path}/data.jsonl:1: ")
    for part in parts:
        assert part in message


def test_no_advice_to_rename_what_is_there(tmp_path):
    message = refusal(tmp_path, [{"source": "x", "prompt": "q", "chosen": TALK, "rejected": OTHER}], PREFERENCE)
    assert "field source is not known" in message and "rename source" not in message


def test_unknown_fields_that_are_null_say_nothing(tmp_path):
    answer = assistant("a") | {"refusal": None, "audio": None, "tool_calls": None}
    (group,) = load(tmp_path, [{"messages": [user("q"), answer], "split": None}]).groups
    assert (group.prompt_ids, group.responses) == tuple(
        getattr(load(tmp_path, [{"messages": TALK}]).groups[0], name) for name in ("prompt_ids", "responses")
    )
    message = refusal(tmp_path, [{"messages": [user("q"), assistant("a") | {"refusal": "no"}]}])
    assert "field messages[1].refusal is not known" in message


def test_responses_that_repeat_their_prompt_are_counted(tmp_path):
    asked = "0123456789abcdef"
    rows = [{"prompt": asked, "completion": asked + "a"}, {"prompt": "q", "completion": "qa"}]
    told = "1 responses that begin with the whole text of their prompt, which then appears twice"
    assert load(tmp_path, rows).report.line() == f"2 of 2 records kept; {told}"


def test_all_faults_of_a_record_are_told_at_once(tmp_path):
    record = {"score": 1, "source": "x", "promt": "q", "responses": [{"txt": "a", "reward": "1"}] * 3, "weak": 1}
    message = refusal(tmp_path, [record], SAMPLES)
    for part in ("fields score, source, promt are not known", "prompt is missing", "responses[0].txt is not known"):
        assert part in message
    assert "(and 2 more like it)" in message and "field weak is 1" in message
    assert message.count("; also: ") == 3


def test_all_faults_of_messages_are_told_at_once(tmp_path):
    turns = [{"role": "narrator", "content": "q"}, {"role": "assistant", "text": "a"}, {"role": "user", "content": 3}]
    message = refusal(tmp_path, [{"messages": turns, "lang": "en"}])
    parts = ["field lang is not known", "field messages[0].role is 'narrator'", "field messages[1].content is missing"]
    parts += ["(and 1 more like it)", "field messages[1].text is not known"]
    for part in parts:
        assert part in message
    message = refusal(tmp_path, [{"messages": [3, {"role": "assistant"}]}])
    assert "field messages[0] is 3" in message and "field messages[1].content is missing" in message


def test_how_many_other_records_have_the_same_faults(tmp_path):
    good, bad = {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "id": 1}
    worse = {"prompt": "", "completion": "a", "id": 1}
    message = refusal(tmp_path, [good, bad, good, worse, bad, {"prompt": "", "completion": "a"}])
    assert "data.jsonl:2: field id is not known" in message
    assert message.endswith(" (the same in 2 of the 5 other records)")
    # 1 + 99 + 1 tokens with the end; the others: good, 1 + 199 + 1, bad otherwise.
    rows = [good, *({"prompt": "q", "completion": "a" * length} for length in (99, 9, 199)), bad]
    message = refusal(tmp_path, rows)
    assert "data.jsonl:2: field completion is 101 tokens long, prompt included; must be at most 99" in message
    assert message.endswith(" (the same in 1 of the 4 other records; the longest has 201 tokens)")


def test_no_template_names_the_format_that_needs_one(tmp_path):
    message = refusal(tmp_path, [{"instruction": "q", "output": "a"}], tokenizer=toy_tokenizer(template=None))
    assert "no chat template" in message and "plain strings" in message and "read as Alpaca" in message


def test_prompts_of_rounds_say_what_to_rename(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(
        UserError, match="field prompt is missing; must be prompt or prompt_ids; rename question to prompt"
    ):
        load_prompt_groups(str(path), toy_tokenizer(), max_length=9, vocab_size=VOCAB_SIZE)
    path.write_text(json.dumps({"messages": TALK}))
    with pytest.raises(UserError, match="field prompt is missing; .* the messages before the answer are the prompt"):
        load_prompt_groups(str(path), toy_tokenizer(), max_length=9, vocab_size=VOCAB_SIZE)
