"""Check every fault of a record: the run stops with file, line and field, or skips and counts the record."""

import json

import pytest

from megalign.data.config import DataConfig
from megalign.data.dataset import load_dataset
from megalign.data.group import Pairing
from megalign.schema import UserError
from tests.support.toy_tokenizer import FORGETFUL, VOCAB_SIZE, assistant, toy_tokenizer, user

SINGLE, SAMPLES, PREFERENCE = Pairing("single"), Pairing("samples"), Pairing("preference")
CONTRAST, EPA = Pairing("contrast", strong=1, weak=0), Pairing("contrast", strong=1, weak=2)
TWO = [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]
GOOD = {
    "single": {"prompt": "1", "completion": "2"},
    "samples": {"prompt": "1", "responses": TWO},
    "preference": {"prompt": "1", "chosen": "2", "rejected": "3"},
    "contrast": {"prompt": "1", "responses": TWO},
}


def samples(**change):
    return {"prompt": "p", "responses": [TWO[0], {"response_ids": [7, 8], "reward": 0, **change}]}


def talk(*turns):
    return {"messages": list(turns)}


# (pairing, record or raw line, what the message says after "data.jsonl:2: ")
BAD = [
    (SINGLE, b"{not json", "the line is not valid JSON"),
    (SINGLE, b"[1, 2]", "the line is a list"),
    (SINGLE, b'{"prompt": "\xff"}', "the line is not valid JSON"),
    (SINGLE, {"prompt": "p", "completion": "c", "score": 1}, "field score is not known"),
    (SINGLE, {"prompt": "p", "complete": "c"}, "field complete is not known"),
    (SINGLE, {"prompt": "p"}, "field completion is missing"),
    (SINGLE, {"completion": "c"}, "field prompt is missing"),
    (SINGLE, {"prompt": "p", "completion": "c", "chosen": "d"}, "field chosen: completion and chosen belong to"),
    (SINGLE, {"prompt": "p", "completion": ""}, "field completion is ''"),
    (SINGLE, {"prompt": "", "completion": "c"}, "field prompt is ''"),
    (SINGLE, {"prompt": "p", "completion": 3}, "field completion is 3"),
    (SINGLE, {"prompt": None, "completion": "c"}, "field prompt is None"),
    (SINGLE, b'{"prompt": "p", "completion": "\\ud800"}', "field completion is '\\ud800'; must be valid Unicode"),
    (SINGLE, {"prompt": "p", "completion": [assistant("c")]}, "field completion is [{'role': 'assistant'"),
    (SINGLE, {"prompt": "p", "prompt_ids": [5], "completion": "c"}, "fields prompt and prompt_ids are both given"),
    (SINGLE, {"prompt_ids": [], "completion": "c"}, "field prompt_ids is []"),
    (SINGLE, {"prompt_ids": [5], "response_ids": []}, "field response_ids is []"),
    (SINGLE, {"prompt_ids": [5], "response_ids": [6, "7"]}, "field response_ids[1] is '7'"),
    (SINGLE, {"prompt_ids": [True], "response_ids": [6]}, "field prompt_ids[0] is True"),
    (SINGLE, {"prompt_ids": [-1], "response_ids": [6]}, "field prompt_ids[0] is -1"),
    (SINGLE, {"prompt_ids": "5 6", "response_ids": [6]}, "field prompt_ids is '5 6'"),
    (SINGLE, {"prompt_ids": [5], "response_ids": [VOCAB_SIZE]}, f"field response_ids is {VOCAB_SIZE}; must be token"),
    (SINGLE, {"prompt_ids": [VOCAB_SIZE], "response_ids": [5]}, f"field prompt_ids is {VOCAB_SIZE}; must be token"),
    (
        SINGLE,
        {"prompt": "p" * 10, "completion": "c" * 10},
        "field completion is 21 tokens long, prompt included; must be at most 20",
    ),
    (SINGLE, {**GOOD["single"], "teacher_scores": {"a": 0.5}}, "field teacher_scores.a is 0.5"),
    (SINGLE, {**GOOD["single"], "teacher_scores": {"a": float("nan")}}, "field teacher_scores.a is nan"),
    (SINGLE, {**GOOD["single"], "teacher_scores": [-1.0]}, "field teacher_scores is [-1.0]"),
    (SINGLE, talk(), "field messages is []"),
    (SINGLE, talk("hello"), "field messages[0] is 'hello'"),
    (SINGLE, talk(user("u"), {"role": "robot", "content": "x"}), "field messages[1].role is 'robot'"),
    (SINGLE, talk({"content": "x"}, assistant("a")), "field messages[0].role is missing"),
    (SINGLE, talk(user("u"), {"role": "assistant", "content": None}), "field messages[1].content is None"),
    (SINGLE, talk(user("u"), {**assistant("a"), "calls": []}), "field messages[1].calls is not known"),
    (SINGLE, talk(user("u"), assistant("a"), user("v")), "field messages[2].role is 'user'"),
    (SINGLE, talk(assistant("a")), "field messages[0].role is 'assistant'"),
    (SINGLE, talk(user("u"), assistant("")), "field messages[1].content is ''"),
    (SINGLE, GOOD["samples"], "field responses holds 2 responses; must be one response"),
    (SINGLE, GOOD["preference"], "field chosen holds 2 responses; must be one response"),
    (SAMPLES, {"prompt": "p", "responses": {}}, "field responses is {}"),
    (SAMPLES, {"prompt": "p", "responses": []}, "field responses is []"),
    (SAMPLES, {"prompt": "p", "responses": ["a", "b"]}, "field responses[0] is 'a'"),
    (SAMPLES, {"prompt": "p", "responses": TWO[:1]}, "field responses has 1 response"),
    (SAMPLES, samples(reward=float("nan")), "field responses[1].reward is nan"),
    (SAMPLES, samples(reward=float("-inf")), "field responses[1].reward is -inf"),
    (SAMPLES, samples(reward=True), "field responses[1].reward is True"),
    (SAMPLES, samples(reward="1"), "field responses[1].reward is '1'"),
    (SAMPLES, samples(reward=10**400), "field responses[1].reward is 1000000"),
    (SAMPLES, {"prompt": "p", "responses": [{"text": "a"}, TWO[1]]}, "field responses[0].reward is missing"),
    (SAMPLES, {"prompt": "p", "responses": [{"reward": 1}, TWO[1]]}, "field responses[0].text is missing"),
    (SAMPLES, samples(text="both"), "fields responses[1].text and responses[1].response_ids are both given"),
    (SAMPLES, samples(response_ids=[]), "field responses[1].response_ids is []"),
    (SAMPLES, samples(response_ids=[5, 999]), "field responses[1].response_ids is 999"),
    (SAMPLES, samples(note="x"), "field responses[1].note is not known"),
    (SAMPLES, samples(logp=[-1.0]), "field responses[1].logp has 1 values; must be 2, one for each"),
    (SAMPLES, samples(logp=[-1.0, 0.1]), "field responses[1].logp[1] is 0.1"),
    (SAMPLES, samples(logp=[-1.0, float("-inf")]), "field responses[1].logp[1] is -inf"),
    (SAMPLES, samples(logp=-1.0), "field responses[1].logp is -1.0"),
    (SAMPLES, GOOD["preference"], "field chosen is a pair without rewards; must be two or more"),
    (SAMPLES, GOOD["single"], "field completion holds one response; must be two or more"),
    (PREFERENCE, talk(user("u"), assistant("a")), "field messages holds one response; must be chosen"),
    (PREFERENCE, {"prompt": "p", "chosen": "c"}, "field rejected is missing"),
    (PREFERENCE, {"chosen": "c", "rejected": "r"}, "field prompt is missing"),
    (PREFERENCE, {"chosen_ids": [5], "rejected_ids": [6]}, "field prompt is missing"),
    (PREFERENCE, {"prompt": "p", "responses": [TWO[0], TWO[0]]}, "field responses is [1.0, 1.0]; must be rewards"),
    (
        PREFERENCE,
        {"chosen": [user("u"), assistant("a")], "rejected": [user("v"), assistant("a")]},
        "field chosen[0] is {'role': 'user'",
    ),
    (
        PREFERENCE,
        {"chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("a")]},
        "field rejected is the same conversation as chosen",
    ),
    (CONTRAST, {"prompt": "p", "responses": [TWO[0], TWO[0]]}, "field responses is [1.0, 1.0]; must be a response"),
    (EPA, {**GOOD["contrast"], "weak": [[0]]}, "field weak[0] is [0]; must be [record, response]"),
    (EPA, {**GOOD["contrast"], "weak": [[0, -1]]}, "field weak[0] is [0, -1]"),
    (EPA, {**GOOD["contrast"], "weak": "all"}, "field weak is 'all'"),
    (EPA, {"prompt": "x", "responses": TWO, "weak": [[7, 0]]}, "field weak[0] is [7, 0]; must be records 0 to 2"),
    (EPA, {"prompt": "x", "responses": TWO, "weak": [[2, 2]]}, "field weak[0] is [2, 2]; must be responses 0 to 1"),
    (EPA, {"prompt": "x", "responses": TWO, "weak": [[0, 0]]}, "field weak[0] is [0, 0]; must be another prompt's"),
    (EPA, {"prompt": "x", "responses": TWO, "weak": [[1, 0]]}, "field weak[0] is [1, 0]; must be another prompt's"),
]


def write(path, lines):
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(text) + b"\n")
    return str(path)


def load(path, pairing, tokenizer=None, **settings):
    cfg = DataConfig(path=path, max_length=20, tokens_per_micro_batch=20, **settings)
    return load_dataset(cfg, tokenizer or toy_tokenizer(), pairing=pairing, seed=0, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.mark.parametrize(("pairing", "record", "message"), BAD)
def test_bad_record(pairing, record, message, tmp_path, tokenizer):
    good = GOOD[pairing.kind]
    path = write(tmp_path / "data.jsonl", [good, record, good])
    with pytest.raises(UserError) as error:
        load(path, pairing, tokenizer)
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert "must be " in str(error.value) or "set data.format" in str(error.value)
    assert "\n" not in str(error.value)

    kept = load(path, pairing, tokenizer, on_bad_record="skip")
    assert [group.record for group in kept.groups] == [0, 2]
    assert kept.report.num_records == 3 and kept.report.num_kept == 2
    assert sum(kept.report.bad.values()) == 1
    assert str(error.value) in kept.report.first_bad.values()


def test_no_negative_at_all_under_weak_ones(tmp_path):
    # The only other response equals x's own, so no weak negative is left.
    records = [
        {"prompt": "x", "responses": [{"text": "a", "reward": 1}]},
        {"prompt": "y", "responses": [{"text": "a", "reward": 1}]},
    ]
    with pytest.raises(UserError, match="data.jsonl:1: field responses: no negative"):
        load(write(tmp_path / "data.jsonl", records), EPA)


def test_report_counts_by_reason(tmp_path):
    lines = [GOOD["single"], b"{", b"{", {"prompt": "p" * 30, "completion": "c"}, {"prompt": "p", "completion": ""}]
    report = load(write(tmp_path / "data.jsonl", lines), SINGLE, on_bad_record="skip").report
    assert report.bad == {"invalid JSON": 2, "too long": 1, "empty response": 1}
    assert report.line() == "1 of 5 records kept; skipped: empty response 1, invalid JSON 2, too long 1"


def test_nothing_usable(tmp_path):
    path = write(tmp_path / "data.jsonl", [b"{"])
    with pytest.raises(UserError, match="no record is usable; the first problem: .*data.jsonl:1: the line is not"):
        load(path, SINGLE, on_bad_record="skip")


def test_unknown_fields_pass_when_told(tmp_path):
    record = {"prompt": "p", "responses": [{**TWO[0], "note": 1}, TWO[1]], "answer": 5}
    data = load(write(tmp_path / "data.jsonl", [record]), SAMPLES, extra_fields="ignore")
    assert data.groups[0].raw["answer"] == 5


def test_named_format_decides_between_two(tmp_path):
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "messages": [user("u"), assistant("a")]}
    path = write(tmp_path / "data.jsonl", [record])
    with pytest.raises(UserError, match="set data.format"):
        load(path, PREFERENCE, extra_fields="ignore")
    data = load(path, PREFERENCE, extra_fields="ignore", format="preference")
    assert data.groups[0].paired
    with pytest.raises(UserError, match="field completion is missing"):
        load(path, SINGLE, extra_fields="ignore", format="prompt_completion")


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="data.path is .*nowhere.jsonl': no such file"):
        load(str(tmp_path / "nowhere.jsonl"), SINGLE)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"data.path \(.*empty.jsonl\) holds no records"):
        load(str(tmp_path / "empty.jsonl"), SINGLE)
    with pytest.raises(UserError, match="data.path is .*a datasets directory|data.path is .*save_to_disk"):
        load(str(tmp_path), SINGLE)
    with pytest.raises(UserError, match="data.path is missing"):
        load(None, SINGLE)
    with pytest.raises(UserError, match=r"data.sources\[1\].path is 'nowhere': no such file"):
        path = write(tmp_path / "data.jsonl", [GOOD["single"]])
        load(None, SINGLE, sources=[{"path": path}, {"path": "nowhere"}])


def test_tokenizers_that_lack_something_always_stop(tmp_path):
    path = write(tmp_path / "data.jsonl", [talk(user("u"), assistant("a"))])
    for settings in ({}, {"on_bad_record": "skip"}):
        with pytest.raises(UserError, match="data.jsonl:1: field messages holds messages.* no chat template"):
            load(path, SINGLE, toy_tokenizer(template=None), **settings)
    path = write(tmp_path / "data.jsonl", [GOOD["single"]])
    with pytest.raises(UserError, match="data.jsonl:1: field completion is a plain string.* no end-of-sequence"):
        load(path, SINGLE, toy_tokenizer(eos=False))
    cfg = DataConfig(path=path, max_length=20, tokens_per_micro_batch=20)
    with pytest.raises(
        UserError, match="data.jsonl:1: field prompt is text, and the model's directory has no tokenizer"
    ):
        load_dataset(cfg, None, pairing=SINGLE, seed=0, vocab_size=9)


def test_template_that_rewrites_earlier_turns_is_a_bad_record(tmp_path):
    record = talk(user("u"), assistant("a"), user("v"), assistant("b"))
    path = write(tmp_path / "data.jsonl", [record])
    tokenizer = toy_tokenizer(template=FORGETFUL)
    assert len(load(path, SINGLE, tokenizer)) == 1  # the last answer alone: its prompt is a prefix
    with pytest.raises(
        UserError, match="data.jsonl:1: field messages: the chat template renders earlier turns differently"
    ):
        load(path, SINGLE, tokenizer, train_on="all_assistant")


def test_template_that_refuses_is_a_bad_record(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "data.jsonl", [talk(user("u"), assistant("a"))])
    with pytest.raises(
        UserError, match="data.jsonl:1: field messages: the chat template refuses .*roles must alternate"
    ):
        load(path, SINGLE, toy_tokenizer(template=template))
