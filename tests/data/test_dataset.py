"""Check loading of files, directories and prompts, several sources, and filters."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import processors

from megalign.data.config import DataConfig
from megalign.data.dataset import from_records, load_dataset
from megalign.data.group import Pairing
from megalign.data.prompts import load_prompt_groups
from megalign.data.record_counts import RecordCounts
from megalign.schema import UserError
from tests.support.chat_templates import TEMPLATES, TOOLS, chat_tokenizer
from tests.support.toy_tokenizer import ASSISTANT, EOS, USER, VOCAB_SIZE, assistant, ids_of, toy_tokenizer, user

SINGLE = Pairing("single")
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


def config(**settings):
    return DataConfig.model_validate({"max_length": 20, "tokens_per_micro_batch": 20, **settings})


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def ids_record(number, **extra):
    return {"prompt_ids": [number + 1], "response_ids": [number + 2], **extra}


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ids_record(0)).encode() + b"\r\n\n" + json.dumps(ids_record(1)).encode()
    )
    data = load_dataset(config(path=str(path)), None, pairing=SINGLE, seed=0, vocab_size=9)
    assert [group.record for group in data.groups] == [0, 1]
    assert data.origins == [f"{path}:1", f"{path}:3"]
    assert data.groups[1].raw == ids_record(1)


def test_a_datasets_directory_equals_its_jsonl(tmp_path):
    records = [
        {
            "prompt": "p",
            "weak": [[1, 0]],
            "responses": [{"text": "a", "reward": 1.0, "logp": [-1.0, -2.0]}, {"text": "b", "reward": 0.0}],
        },
        {"prompt": "q", "responses": [{"text": "c", "reward": 0.5}] * 3},
    ]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "folder")
    path = write(tmp_path / "data.jsonl", records)
    pairing, tokenizer = Pairing("samples"), toy_tokenizer()
    folder, lines = (
        load_dataset(config(path=str(one)), tokenizer, pairing=pairing, seed=0, vocab_size=VOCAB_SIZE)
        for one in (tmp_path / "folder", path)
    )
    assert folder.groups == lines.groups
    assert folder.origins == [f"{tmp_path / 'folder'}:0", f"{tmp_path / 'folder'}:1"]


def test_a_directory_of_splits_is_refused_with_their_names(tmp_path):
    split = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"holds splits; must be one of its folders \['test', 'train'\]"):
        load_dataset(config(path=str(tmp_path / "both")), None, pairing=SINGLE, seed=0, vocab_size=9)
    path = str(tmp_path / "both" / "test")
    assert len(load_dataset(config(path=path), toy_tokenizer(), pairing=SINGLE, seed=0, vocab_size=VOCAB_SIZE)) == 1


def test_sources_number_records_on_and_pins_stay_in_their_own(tmp_path):
    def rewarded(prompt, **extra):
        responses = [{"response_ids": [10 * prompt + i], "reward": -i} for i in range(2)]
        return {"prompt_ids": [prompt], "responses": responses, **extra}

    one = write(tmp_path / "one.jsonl", [rewarded(1), rewarded(2), {"prompt_ids": []}])
    two = write(tmp_path / "two.jsonl", [rewarded(3, weak=[[1, 1]]), rewarded(4)])
    cfg = config(sources=[{"path": one, "weight": 2.0}, {"path": two, "weight": 0.5}], on_bad_record="skip")
    pairing = Pairing("contrast", strong=1, weak=1)
    data = load_dataset(cfg, None, pairing=pairing, seed=0, vocab_size=VOCAB_SIZE)
    assert [group.record for group in data.groups] == [0, 1, 3, 4]
    assert [(span.num_records, span.weight) for span in data.spans] == [(2, 2.0), (2, 0.5)]
    assert data.epoch_size == 5
    flat, _ = data.sequences([(0, 2)])
    assert [(one.record, one.role, one.response.ids) for one in flat] == [
        (3, "positive", (30,)),
        (3, "strong", (31,)),
        (3, "weak", (41,)),
    ]
    with pytest.raises(UserError, match=r"two.jsonl:1: field weak\[0\] is \[2, 0\]; must be records 0 to 1"):
        write(tmp_path / "two.jsonl", [rewarded(3, weak=[[2, 0]]), rewarded(4)])
        write(tmp_path / "one.jsonl", [rewarded(1), rewarded(2)])
        load_dataset(cfg.model_copy(update={"on_bad_record": "stop"}), None, pairing=pairing, seed=0, vocab_size=99)


def test_steps_follow_the_stream():
    data = from_records([ids_record(n) for n in range(5)], config(), None, pairing=SINGLE, seed=0, vocab_size=9)
    assert data.step_items(1, groups_per_step=3, shuffle=False) == [(0, 3), (0, 4), (1, 0)]
    shuffled = [index for step in range(5) for _, index in data.step_items(step, groups_per_step=1, shuffle=True)]
    assert sorted(shuffled) == list(range(5))


def test_filter_keeps_the_best_and_the_files_order():
    scores = [-3.0, -1.0, -2.0, -1.0, -5.0]
    records = [ids_record(n, teacher_scores={"a": s}) for n, s in enumerate(scores)]
    data = from_records(records, config(), None, pairing=SINGLE, seed=0, vocab_size=9)
    assert [group.record for group in data.keep_highest(0.8).groups] == [0, 1, 2, 3]
    assert [group.record for group in data.keep_highest(0.2).groups] == [1]
    assert [group.record for group in data.keep_highest(0.1).groups] == [1]
    assert data.keep_highest(1.0).groups == data.groups
    assert data.keep_highest(0.8).epoch_size == 4
    assert data.keep_highest(0.4).origins == ["record:1", "record:3"]


def test_teacher_scores_can_come_later():
    records = [ids_record(n) for n in range(3)]
    data = from_records(records, config(), None, pairing=SINGLE, seed=0, vocab_size=9)
    with pytest.raises(UserError, match="record:0: field teacher_scores is missing; data.filter"):
        data.keep_highest(0.5)
    scored = data.with_teacher_scores([{"a": -1.0, "b": -3.0}, {"a": -1.0, "b": -1.0}, {"a": -9.0, "b": -9.0}])
    assert [group.record for group in scored.keep_highest(0.67).groups] == [0, 1]
    assert [one.teacher_score for one in scored.sequences([(0, 0), (0, 1)])[0]] == [-2.0, -1.0]


def test_prompts_keep_what_the_reward_needs(tmp_path):
    records = [{"prompt": "1+1=", "answer": "2"}, {"prompt": [user("q")], "answer": "a"}, {"prompt_ids": [7, 8]}]
    path = write(tmp_path / "prompts.jsonl", records)
    prompts = load_prompt_groups(path, toy_tokenizer(), max_length=4, vocab_size=VOCAB_SIZE)
    assert [list(one.prompt_ids) for one in prompts] == [ids_of("1+1="), [USER, *ids_of("q"), EOS, ASSISTANT], [7, 8]]
    assert prompts[0].raw["answer"] == "2" and prompts[0].responses == ()


def test_prompts_of_messages_bring_tools_variables_and_a_beginning_of_the_answer(tmp_path):
    given = {"prompt": [user("what"), assistant("It is")], "tools": TOOLS, "chat_template_kwargs": {"mood": "kind"}}
    template = "{{ mood }}" + TEMPLATES["chatml_tools"]
    tokenizer = chat_tokenizer(template)
    (prompt,) = load_prompt_groups(write(tmp_path / "a.jsonl", [given]), tokenizer, max_length=999, vocab_size=999)
    text = f"kind<|im_start|>system\n<tools>{json.dumps(TOOLS)}</tools><|im_end|>\n"
    text += "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nIt is"
    assert tokenizer.decode(prompt.prompt_ids) == text
    # Training on an answer to it begins with the same ids.
    cfg = config(path=write(tmp_path / "b.jsonl", [{**given, "completion": " four"}]), max_length=999)
    data = load_dataset(cfg, tokenizer, pairing=SINGLE, seed=0, vocab_size=999)
    assert data.groups[0].prompt_ids == prompt.prompt_ids
    # A field that no template reads is refused unless it is said to be ignored.
    path = write(tmp_path / "c.jsonl", [{"prompt": [user("what") | {"note": 1}]}])
    with pytest.raises(UserError, match=r"c.jsonl:1: field prompt\[0\].note is not known"):
        load_prompt_groups(path, tokenizer, max_length=999, vocab_size=999)
    assert load_prompt_groups(path, tokenizer, max_length=999, vocab_size=999, extra_fields="ignore")


def test_the_report_tells_what_was_decided_about_texts(tmp_path):
    records = [{"prompt": "a\n", "completion": "\nb"}, {"prompt": "a", "completion": "b"}]
    cfg = config(path=write(tmp_path / "a.jsonl", records), max_length=999)
    data = load_dataset(cfg, chat_tokenizer(None), pairing=SINGLE, seed=0, vocab_size=999)
    decided = "1 responses tokenised apart from their prompt, because tokens would merge across the border"
    assert data.report.line() == f"2 of 2 records kept; {decided}"


def test_the_report_of_prompts_tells_what_was_decided_about_kept_ones(tmp_path):
    beginning = [user("what"), assistant("<think>\n")]
    path = write(tmp_path / "a.jsonl", [{"prompt": beginning}, {"prompt": [*beginning[:1], assistant("<think>" * 99)]}])
    report = RecordCounts()
    tokenizer = chat_tokenizer(TEMPLATES["thinking"])
    load_prompt_groups(path, tokenizer, max_length=60, vocab_size=999, on_bad_record="skip", report=report)
    decided = "1 prompts whose last message is appended verbatim to the generation prompt"
    assert report.line() == f"1 of 2 records kept; skipped: too long 1; {decided}"


def test_a_start_token_in_the_text_beside_the_tokenizers_own_is_counted(tmp_path):
    records = [{"prompt": "<s>a", "completion": "b"}, {"prompt": "a<s>", "completion": "b"}]
    path = write(tmp_path / "a.jsonl", records)
    tokenizer = chat_tokenizer(None)
    start = tokenizer.bos_token_id
    frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.backend_tokenizer.post_processor = frame
    told = "1 prompts that begin with <s> twice: in their text, and added by data.special_tokens: auto"
    data = load_dataset(config(path=path), tokenizer, pairing=SINGLE, seed=0, vocab_size=999)
    assert data.groups[0].prompt_ids[:2] == (start, start) and data.report.line() == f"2 of 2 records kept; {told}"
    report = RecordCounts()
    load_prompt_groups(path, tokenizer, max_length=9, vocab_size=999, report=report)
    assert report.line() == data.report.line()
    plain = load_dataset(config(path=path, special_tokens="none"), tokenizer, pairing=SINGLE, seed=0, vocab_size=999)
    assert plain.report.line() == "2 of 2 records kept" and plain.groups[0].prompt_ids == data.groups[0].prompt_ids[1:]


def test_the_day_and_special_tokens_of_the_configuration_reach_the_texts(tmp_path):
    record = {"messages": [user("what"), assistant("four")]}
    cfg = config(path=write(tmp_path / "a.jsonl", [record]), max_length=999, date="2026-01-31")
    tokenizer = chat_tokenizer(TEMPLATES["channels"])
    data = load_dataset(cfg, tokenizer, pairing=SINGLE, seed=0, vocab_size=999)
    assert "Current date: 2026-01-31" in tokenizer.decode(data.groups[0].prompt_ids)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "2"}, "field prompt is missing"),
        ({"prompt": ""}, "field prompt is ''"),
        ({"prompt": "12345"}, "field prompt is 5 tokens long, prompt included; must be at most 4"),
        ({"prompt_ids": [VOCAB_SIZE]}, f"field prompt_ids is {VOCAB_SIZE}"),
        ({"prompt_ids": [7], "prompt": "1"}, "fields prompt and prompt_ids are both given"),
    ],
)
def test_bad_prompts(tmp_path, record, message):
    path = write(tmp_path / "prompts.jsonl", [record])
    with pytest.raises(UserError) as error:
        load_prompt_groups(path, toy_tokenizer(), max_length=4, vocab_size=VOCAB_SIZE)
    assert str(error.value).startswith(f"{path}:1: {message}")


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not next to the checkout")
def test_gsm8k(tmp_path):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:200]]
    records = [{"messages": [user(row["question"]), assistant(row["answer"])]} for row in rows]
    cfg = config(path=write(tmp_path / "data.jsonl", records), max_length=4096)
    data = load_dataset(cfg, toy_tokenizer(), pairing=SINGLE, seed=0, vocab_size=VOCAB_SIZE)
    assert len(data) == 200
    flat, _ = data.sequences(data.step_items(0, groups_per_step=200, shuffle=True))
    for one in flat:
        row = rows[one.record]
        # <user> question <eos> <assistant> | answer <eos>, one id a character
        assert len(one.prompt_ids) == len(row["question"]) + 3
        assert one.num_scored == len(row["answer"]) + 1
