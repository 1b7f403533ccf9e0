"""Six kinds of tokenizers on TRL's record formats: our tokens beside those that TRL's own preparation gives.

TRL's functions are called, not copied: `_prepare_dataset` of its SFT and DPO trainers and `apply_chat_template`. Every
difference stands in MEANT with its reason, each reason in docs/tokens.md, and each has a check of what we do instead.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError
from tokenizer_kinds import KINDS

from megalign.data.records import BadRecord, check_record
from megalign.data.tokenize import encode_record

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
    "pair of messages, three turns": pair([user("a"), assistant("the"), user("2+3=")], [assistant("5")], [assistant("6")]),
    "pair of messages, tools": pair([ASK], [CALL], [assistant("no")], tools=[WEATHER]),
    "implicit prompt": {"chosen": [user("2+3="), assistant("5")], "rejected": [user("2+3="), assistant("6")]},
    "implicit prompt, four turns": {
        "chosen": [user("a"), assistant("the"), user("2+3="), assistant("5")],
        "rejected": [user("a"), assistant("the"), user("2+3="), assistant("6")],
    },
    "implicit prompt of strings": {"chosen": "2+3=5", "rejected": "2+3=6"},
}


@pytest.fixture(scope="session")
def trl():
    """TRL's preparation of one record: prompt ids and ids of each answer, or all ids and which of them are trained on."""
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
def tokenizers():
    return {kind: make() for kind, make in KINDS.items()}


def ours(record, tokenizer, **settings):
    """What training sees of the record, in the shape of the fixture; None where the record is refused."""
    record = copy.deepcopy(record)
    try:
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
