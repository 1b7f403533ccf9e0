"""Compare our tokens with TRL's, for six kinds of tokenizers and all record formats of TRL.

TRL's functions are called, not copied: `_prepare_dataset` of its SFT and DPO trainers and `apply_chat_template`. Every
difference stands in MEANT with its reason, each reason in docs/tokens.md, and each has a check of what we do instead.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from megalign.data.formats import recognise
from megalign.data.records import BadRecord, check_record
from megalign.data.tokenize import TextOptions, encode_prompt, encode_record
from tests.support.tokenizer_kinds import KINDS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tokens.md"
BYTES, START, BLANK, GEMMA, END, PIECES = KINDS
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def single(prompt, completion, **more):
    return {"prompt": prompt, "completion": completion, **more}


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


SYSTEM = {"role": "system", "content": "You tell."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}
RESULT = {"role": "tool", "name": "weather", "content": "sun"}
ASK = user("weather in Rome")
# name: record; {eos} stands for the tokenizer's end token.
CASES = {
    "strings": single("2+3=", "5"),
    "strings, a sentence": single("What colour is the sky?", " Blue."),
    "strings, no blank": single("The sky is", "blue."),
    "strings, two blanks": single("The sky is ", " blue."),
    "strings, the prompt ends in a blank": single("The sky is ", "blue."),
    "strings, line ends on both sides": single("Question: 2+3\n", "\n5\n"),
    "strings, inside a word": single("ques", "tion"),
    "strings, closed by hand": single("2+3=", "5{eos}"),
    "messages as prompt": single([user("What colour is the sky?")], [assistant("Blue.")]),
    "messages as prompt, three turns": single([user("2+3="), assistant("5"), user("2+4=")], [assistant("6")]),
    "messages as prompt, system": single([SYSTEM, user("2+3=")], [assistant("5")]),
    "messages as prompt, a line end first": single([user("2+3=")], [assistant("\n5")]),
    "messages as prompt, several turns after": single([user("2+3=")], [assistant("5"), user("2+4="), assistant("6")]),
    "messages as prompt, the answer begun": single([user("2+3="), assistant("The sum is")], [assistant(" 5")]),
    "messages as prompt, template's arguments": single(
        [user("2+3=")], [assistant("5")], chat_template_kwargs={"enable_thinking": False}
    ),
    "messages as prompt, a call": single([ASK], [CALL], tools=[WEATHER]),
    "messages as prompt, tools as JSON": single([ASK], [CALL], tools=json.dumps([WEATHER])),
    "messages as prompt, a call's result": single([ASK, CALL, RESULT], [assistant("sun")], tools=[WEATHER]),
    "messages": {"messages": [user("2+3="), assistant("5")]},
    "messages, four turns": {"messages": [user("2+3="), assistant("5"), user("2+4="), assistant("6")]},
    "messages, system": {"messages": [SYSTEM, user("2+3="), assistant("5")]},
    "messages, tools": {"messages": [ASK, CALL, RESULT, assistant("sun")], "tools": [WEATHER]},
    "pair": pair("2+3=", "5", "6"),
    "pair, sentences": pair("What colour is the sky?", " Blue.", " Green."),
    "pair, the prompt ends in a blank": pair("The sky is ", "blue.", " red."),
    "pair of messages": pair([user("2+3=")], [assistant("5")], [assistant("6")]),
    "pair of messages, three turns": pair(
        [user("a"), assistant("the"), user("2+3=")], [assistant("5")], [assistant("6")]
    ),
    "pair of messages, tools": pair([ASK], [CALL], [assistant("no")], tools=[WEATHER]),
    "implicit prompt": {"chosen": [user("2+3="), assistant("5")], "rejected": [user("2+3="), assistant("6")]},
    "implicit prompt, four turns": {
        "chosen": [user("a"), assistant("the"), user("2+3="), assistant("5")],
        "rejected": [user("a"), assistant("the"), user("2+3="), assistant("6")],
    },
    "implicit prompt of strings": {"chosen": "2+3=5", "rejected": "2+3=6"},
}


SPLIT = [name for name in CASES if name.startswith(("strings", "pair")) and "messages" not in name]
TOOLS = [name for name in CASES if "tools" in name or "a call" in name]
# reason (a row of docs/tokens.md): {case: kinds of tokenizers}
MEANT = {
    "a token that spans the border of prompt and response": {
        "strings": [BLANK],
        "strings, closed by hand": [BLANK],
        "strings, the prompt ends in a blank": [BYTES, START, BLANK, GEMMA],
        "strings, line ends on both sides": [BYTES, START, BLANK],
        "strings, inside a word": [BYTES, START, BLANK, GEMMA],
        "messages as prompt, a line end first": [BYTES],
        "pair": [BLANK],
        "pair, the prompt ends in a blank": [BYTES, START, BLANK, GEMMA],
    },
    "a second end": {name: [END, PIECES] for name in SPLIT},
    "an answer that is begun": {"messages as prompt, the answer begun": list(KINDS)},
    "turns between answers": {"messages as prompt, several turns after": list(KINDS)},
    "the generation prompt's own text": {"messages as prompt, template's arguments": [BYTES]},
    "arguments that a template does not read": {
        "messages as prompt, template's arguments": [START, BLANK, GEMMA, END, PIECES]
    },
    "tools that a template does not write": {name: [GEMMA, END, PIECES] for name in TOOLS},
    "dialogues as strings": {"implicit prompt of strings": list(KINDS)},
}


@pytest.fixture(scope="session")
def trl():
    """TRL's preparation of one record: ids of the prompt and each answer, or all ids and which are trained on."""
    pytest.importorskip("trl")
    import datasets
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    settings = {"output_dir": "unused", "max_length": None, "report_to": "none", "use_cpu": True, "bf16": False}

    def prepared(record, tokenizer, *, assistant_only=False):
        rows = datasets.Dataset.from_list([copy.deepcopy(record)]).to_iterable_dataset()
        trainer = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=None, completion_only_loss=not assistant_only and "prompt" in record
        )
        if "chosen" in record:
            rows = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, DPOConfig(**settings), "train")
            row = next(iter(rows))
            return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        cfg = SFTConfig(**settings, assistant_only_loss=assistant_only)
        row = next(iter(SFTTrainer._prepare_dataset(trainer, rows, tokenizer, cfg, False, None, "train")))
        return row["input_ids"], [label != -100 for label in row["labels"]]

    return prepared


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Each kind as it is loaded from a model's directory."""
    loaded = {}
    for kind, make in KINDS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        make().save_pretrained(folder)
        loaded[kind] = AutoTokenizer.from_pretrained(folder)
    return loaded


def ours(record, tokenizer, **settings):
    """What training sees of the record, in the shape of the fixture; None where the record is refused."""
    try:
        record = recognise(copy.deepcopy(record)).record
        format = check_record(record)
        prompt, responses = encode_record(record, tokenizer, format=format, **settings)
    except BadRecord:
        return None
    if format == "preference":
        return list(prompt), *(list(response.ids) for response in responses)
    (response,) = responses
    scored = response.scored or [True] * len(response.ids)
    return [*prompt, *response.ids], [False] * len(prompt) + list(scored)


def theirs(trl, record, tokenizer, **settings):
    """The same of TRL; None where the chat template refuses the record."""
    try:
        return trl(record, tokenizer, **settings)
    except TemplateError:
        return None


def filled(name, tokenizer):
    return json.loads(json.dumps(CASES[name]).replace("{eos}", tokenizer.eos_token))


def split(tokens):
    """(prompt, answers ...) of either shape."""
    if isinstance(tokens[1][0], bool):
        first = tokens[1].index(True)
        return [tokens[0][:first], tokens[0][first:]]
    return list(tokens)


def reason_of(kind, name):
    reasons = [reason for reason, cases in MEANT.items() if kind in cases.get(name, [])]
    assert len(reasons) < 2, f"{kind}, {name}: {reasons}"
    return reasons[0] if reasons else None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_trls_or_the_difference_is_meant(kind, name, trl, tokenizers):
    tokenizer = tokenizers[kind]
    record = filled(name, tokenizer)
    by_mask = "messages" in record
    own = ours(record, tokenizer, train_on="all_assistant")
    other = theirs(trl, record, tokenizer, assistant_only=by_mask)
    reason = reason_of(kind, name)
    if reason is None:
        assert own == other
    else:
        assert own != other, f"no difference any more: take {kind}, {name} out of {reason!r}"
        CHECKS[reason](own, other, record, tokenizer, trl)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("messages") and "prompt" not in name])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_answer_is_trls_completion_behind_the_other_turns(kind, name, trl, tokenizers):
    tokenizer = tokenizers[kind]
    record = filled(name, tokenizer)
    turns = record.pop("messages")
    own = ours({"messages": turns, **record}, tokenizer)
    if reason_of(kind, name) is not None:
        assert own is None
    else:
        assert own == theirs(trl, {"prompt": turns[:-1], "completion": turns[-1:], **record}, tokenizer)


def check_whole_prompt(own, other, record, tokenizer, trl):
    """TRL leaves the prompt's end out; we keep all its tokens, and all the text is there."""
    prompt, *answers = split(own)
    assert prompt[: len(split(other)[0])] == split(other)[0] and len(prompt) > len(split(other)[0])
    if isinstance(record["prompt"], list):
        text = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [record["completion"][-1]["content"]]
    else:
        text = record["prompt"]
        assert prompt == tokenizer(text)["input_ids"]
        ends = [record[name] for name in ("completion", "chosen", "rejected") if name in record]
    for ids, end in zip(answers, ends, strict=True):
        if isinstance(record["prompt"], str):
            end = end.removesuffix(tokenizer.eos_token)
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
            assert tokenizer.decode([*prompt, *ids], skip_special_tokens=True).removeprefix(" ") == text + end
        else:
            assert tokenizer.decode([*prompt, *ids]).startswith(text + end)


def check_one_end(own, other, record, tokenizer, trl):
    """The tokenizer ends a text by itself, TRL adds an end before that; where tokens merge TRL's prompt is cut, too."""
    prompt, *answers = split(own)
    front = tokenizer(record["prompt"])["input_ids"]
    assert front[-1] == tokenizer.eos_token_id and prompt == front[:-1]
    for ids in answers:
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    for ids, theirs in zip(answers, split(other)[1:], strict=True):
        assert theirs[-2:] == [tokenizer.eos_token_id] * 2
        if prompt == split(other)[0]:
            assert theirs == [*ids, tokenizer.eos_token_id] or record["prompt"].endswith(" ")


def check_continued(own, other, record, tokenizer, trl):
    """TRL's trainer closes the begun answer and opens another; its `apply_chat_template` continues it, as we do."""
    from trl import apply_chat_template

    text = apply_chat_template({"prompt": record["prompt"]}, tokenizer)["prompt"]
    assert text.endswith("The sum is")
    prompt, answer = split(own)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip().startswith("5")
    assert len(split(other)[0]) > len(prompt)


def check_between(own, other, record, tokenizer, trl):
    """TRL trains on what the user says between two answers, too, unless it is asked for `assistant_only_loss`."""
    ids, scored = own
    assert ids == other[0] and all(other[1][other[1].index(True) :])
    assert own == trl(record, tokenizer, assistant_only=True)


def check_sampled(own, other, record, tokenizer, trl):
    """The generation prompt holds more than the template writes before an answer, which stands behind all of it."""
    text = tokenizer.apply_chat_template(
        record["prompt"], tokenize=False, add_generation_prompt=True, **record["chat_template_kwargs"]
    )
    prompt, answer = split(own)
    assert prompt == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer == split(other)[1] and len(split(other)[0]) < len(prompt)


def check_refused(own, other, record, tokenizer, trl):
    """TRL goes on without what it was given; a record of ours is refused."""
    assert own is None and other is not None


CHECKS = {
    "a token that spans the border of prompt and response": check_whole_prompt,
    "a second end": check_one_end,
    "an answer that is begun": check_continued,
    "turns between answers": check_between,
    "the generation prompt's own text": check_sampled,
    "arguments that a template does not read": check_refused,
    "tools that a template does not write": check_refused,
    "dialogues as strings": check_refused,
}


def test_every_difference_stands_in_the_documentation():
    text = DOCS.read_text(encoding="utf-8").partition("## Where TRL does otherwise")[2]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(MEANT) == list(CHECKS)  # rows[0] is the table's head


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_other_programs_are_read_as_trl_reads_them(kind, trl, tokenizers):
    from trl.data_utils import maybe_extract_prompt

    tokenizer = tokenizers[kind]
    said = [{"from": "user", "value": "2+3="}, {"from": "assistant", "value": "5"}]
    for record in ({"conversations": said}, {"messages": said}):
        assert ours(record, tokenizer) == trl({"conversations": said}, tokenizer, assistant_only=True)
    sides = {"chosen": [user("2+3="), assistant("5")], "rejected": [user("2+3="), assistant("6")]}
    for prompt in ("2+3=", [user("2+3=")]):
        record = {"prompt": prompt, **sides}
        given = maybe_extract_prompt(record) if isinstance(prompt, str) else sides
        assert ours(record, tokenizer) == trl(given, tokenizer)


@pytest.mark.parametrize("kind", [BYTES, START, BLANK, GEMMA])
def test_wherever_a_text_is_cut_all_of_it_is_there(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for text in ("2+3=5\n2+4=6", "The sky  is blue.\n\nQuestion two", " a \n b"):
        joint = tokenizer(text + tokenizer.eos_token)["input_ids"]
        for cut in range(1, len(text)):
            record = single(text[:cut], text[cut:])
            prompt, answer = split(ours(record, tokenizer))
            assert prompt == tokenizer(text[:cut])["input_ids"], record
            if joint[: len(prompt)] == prompt:
                assert prompt + answer == joint, record
            ids = [*prompt, *answer]
            assert answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id, record
            assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(joint, skip_special_tokens=True)


@pytest.mark.parametrize("name", [name for name, record in CASES.items() if "completion" in record])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_tokens_of_single_answers(kind, name, tokenizers):
    tokenizer = tokenizers[kind]
    record = filled(name, tokenizer)
    single_tokens = ours(record, tokenizer)
    if single_tokens is None:
        return
    prompt, answer = split(single_tokens)
    record["responses"] = [{"text": record.pop("completion"), "reward": 1}] * 2
    assert check_record(record) == "responses"
    prompt_ids, responses = encode_record(record, tokenizer, format="responses")
    assert encode_prompt(record, tokenizer) == prompt_ids == tuple(prompt)
    assert [response.ids for response in responses] == [tuple(answer)] * 2


def test_without_special_tokens_strings_get_none(tokenizers):
    options = TextOptions(special_tokens="none")
    for kind, tokenizer in tokenizers.items():
        prompt, answer = split(ours(CASES["strings"], tokenizer, options=options))
        assert prompt == tokenizer("2+3=", add_special_tokens=False)["input_ids"], kind
        assert answer[-1] == tokenizer.eos_token_id
