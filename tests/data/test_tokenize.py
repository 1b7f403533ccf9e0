"""Check token ids and masks, written out by hand from the toy tokenizer's table."""

from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megalign.data.group import Group
from megalign.data.records import BadRecord, check_record
from megalign.data.tokenize import TextOptions, encode_prompt, encode_record, retokenize
from megalign.schema import UserError
from tests.support.chat_templates import chat_tokenizer
from tests.support.tokenizer_kinds import word_piece
from tests.support.toy_tokenizer import ASSISTANT, EOS, SYSTEM, TEMPLATE, USER, assistant, ids_of, toy_tokenizer, user


def turn(role, text):
    return [role, *ids_of(text), EOS]


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def encode(record, tokenizer, **options):
    prompt_ids, responses = encode_record(record, tokenizer, format=check_record(record), **options)
    assert all(response.scored is None or len(response.scored) == len(response.ids) for response in responses)
    return list(prompt_ids), [(list(one.ids), None if one.scored is None else list(one.scored)) for one in responses]


def test_plain_strings_have_no_template_and_end_with_eos(tokenizer):
    record = {"prompt": "1+1=", "completion": " 2"}
    assert encode(record, tokenizer) == (ids_of("1+1="), [([*ids_of(" 2"), EOS], None)])


def framed(front, back, *, blank=False):
    """A tokenizer of characters that puts special tokens around texts; blank: as SentencePiece, one before a text."""
    names = ["<s>", "</s>", "[SEP]", "\u2581", *"0123456789+=ab\n"]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first" if blank else "never"), pre_tokenizers.Split("", "isolated")]
    )
    single = " ".join([*front, "$A", *back])
    frame = [(name, names.index(name)) for name in {*front, *back}]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=frame) if frame else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", sep_token="[SEP]")
    return tokenizer, lambda text: [names.index(name) for name in text.replace(" ", "\u2581")]


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize(
    ("front", "back"),
    [
        ((), ()),  # GPT-2
        (("<s>",), ()),  # Llama, Gemma
        (("<s>",), ("</s>",)),  # add_eos_token
        ((), ("</s>",)),  # T5
        (("<s>",), ("[SEP]",)),  # BERT
    ],
)
def test_strings_get_the_special_tokens_in_front_once_and_none_at_the_border(front, back, blank):
    tokenizer, ids = framed(front, back, blank=blank)
    begin = [0] if front else []
    record = {"prompt": "2+3=", "completion": "5"}
    prompt = ids(" 2+3=" if blank else "2+3=")
    # The 5 stands behind the =, so it has no blank of its own; one end, whatever the tokenizer appends.
    assert encode(record, tokenizer) == (begin + prompt, [([*ids("5"), 1], None)])
    assert encode(record, tokenizer, options=TextOptions(special_tokens="none")) == (prompt, [([*ids("5"), 1], None)])
    assert list(encode_prompt({"prompt": "2+3="}, tokenizer)) == begin + prompt
    assert encode({**record, "completion": "5</s>"}, tokenizer)[1] == [([*ids("5"), 1], None)]
    assert encode({**record, "completion": " 5"}, tokenizer)[1] == [([*ids(" 5"), 1], None)]
    pair = {"prompt": "2+3=", "chosen": "5", "rejected": "6"}
    assert encode(pair, tokenizer) == (begin + prompt, [([*ids("5"), 1], None), ([*ids("6"), 1], None)])
    assert encode({"prompt_ids": [7], "completion": "5"}, tokenizer) == ([7], [([*ids("5"), 1], None)])


def test_a_response_that_would_merge_with_its_prompt_is_tokenised_apart_and_counted():
    tokenizer = chat_tokenizer(None)
    newline, both = tokenizer("\n")["input_ids"], tokenizer("\n\n")["input_ids"]
    assert len(newline) == len(both) == 1 and newline != both
    a, end, notes = tokenizer("a")["input_ids"], tokenizer.eos_token_id, Counter()
    assert encode({"prompt": "a\n", "completion": "\na"}, tokenizer, notes=notes) == (
        a + newline,
        [([*newline, *a, end], None)],
    )
    assert notes == {"responses tokenised apart from their prompt, because tokens would merge across the border": 1}
    assert encode({"prompt": "a", "completion": "\n\n"}, tokenizer, notes=notes)[1] == [([*both, end], None)]
    assert notes.total() == 1


def test_a_response_that_the_tokenizer_drops_whole_is_refused():
    with pytest.raises(
        BadRecord, match="field completion has no tokens; must be text that the tokenizer turns into tokens"
    ):
        encode({"prompt": "a", "completion": " \n"}, word_piece())


def test_last_assistant_turn(tokenizer):
    record = {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("bc")]}
    prompt = turn(SYSTEM, "s") + turn(USER, "q") + turn(ASSISTANT, "a") + turn(USER, "r") + [ASSISTANT]
    assert encode(record, tokenizer) == (prompt, [([*ids_of("bc"), EOS], None)])


def test_every_assistant_turn_by_mask(tokenizer):
    record = {"messages": [user("q"), assistant("a"), user("r"), assistant("bc")]}
    prompt = turn(USER, "q") + [ASSISTANT]
    response = [*ids_of("a"), EOS] + turn(USER, "r") + turn(ASSISTANT, "bc")
    # a <eos> | <user> r <eos> <assistant> | b c <eos>
    scored = [True] * 2 + [False] * 4 + [True] * 3
    assert encode(record, tokenizer, train_on="all_assistant") == (prompt, [(response, scored)])


def test_one_assistant_turn_needs_no_mask(tokenizer):
    record = {"messages": [user("q"), assistant("a")]}
    assert encode(record, tokenizer, train_on="all_assistant") == encode(record, tokenizer)


@pytest.mark.parametrize("completion", ["a", [assistant("a")]])
def test_string_and_list_are_one_assistant_turn_after_messages(tokenizer, completion):
    record = {"prompt": [user("q")], "completion": completion}
    assert encode(record, tokenizer) == (turn(USER, "q") + [ASSISTANT], [([*ids_of("a"), EOS], None)])


def test_completion_of_several_turns_scores_the_assistant_alone(tokenizer):
    record = {"prompt": [user("q")], "completion": [assistant("a"), user("r"), assistant("b")]}
    response = [*ids_of("a"), EOS] + turn(USER, "r") + turn(ASSISTANT, "b")
    scored = [True] * 2 + [False] * 4 + [True] * 2
    assert encode(record, tokenizer) == (turn(USER, "q") + [ASSISTANT], [(response, scored)])


def test_ids_are_taken_as_they_are(tokenizer):
    assert encode({"prompt_ids": [7], "response_ids": [8, 9]}, None) == ([7], [([8, 9], None)])
    # Mixed: each side for itself.
    assert encode({"prompt": "1", "response_ids": [8]}, tokenizer) == (ids_of("1"), [([8], None)])
    assert encode({"prompt_ids": [7], "completion": "1"}, tokenizer) == ([7], [([*ids_of("1"), EOS], None)])
    record = {"prompt_ids": [7], "chosen_ids": [8], "rejected": "1"}
    assert encode(record, tokenizer) == ([7], [([8], None), ([*ids_of("1"), EOS], None)])


def test_responses_keep_order_reward_and_logp(tokenizer):
    record = {
        "prompt": [user("q")],
        "responses": [{"text": "a", "reward": 1, "logp": [-0.5, 0]}, {"response_ids": [9], "reward": -2.5}],
    }
    prompt_ids, (first, second) = encode_record(record, tokenizer, format="responses")
    assert list(prompt_ids) == turn(USER, "q") + [ASSISTANT]
    assert (first.ids, first.reward, first.behaviour_logp) == ((*ids_of("a"), EOS), 1.0, (-0.5, 0.0))
    assert (second.ids, second.reward, second.behaviour_logp) == ((9,), -2.5, None)


def test_implicit_prompt_is_what_both_sides_begin_with(tokenizer):
    shared = [user("q"), assistant("a"), user("r")]
    record = {"chosen": [*shared, assistant("b")], "rejected": [*shared, assistant("c")]}
    explicit = {"prompt": shared, "chosen": "b", "rejected": "c"}
    assert encode(record, tokenizer) == encode(explicit, tokenizer)
    assert encode(record, tokenizer)[1] == [([*ids_of("b"), EOS], None), ([*ids_of("c"), EOS], None)]


def test_an_implicit_prompt_that_ends_with_the_assistant_is_whole_messages(tokenizer):
    shared = [user("q"), assistant("a")]
    record = {"chosen": [*shared, assistant("b")], "rejected": [*shared, assistant("c")]}
    prompt = turn(USER, "q") + turn(ASSISTANT, "a") + [ASSISTANT]
    assert encode(record, tokenizer) == (prompt, [([*ids_of("b"), EOS], None), ([*ids_of("c"), EOS], None)])
    # As a prompt of its own it is the beginning of the answer.
    record = {"prompt": shared, "chosen": "b", "rejected": [assistant("c")]}
    prompt = turn(USER, "q") + [ASSISTANT, *ids_of("a")]
    assert encode(record, tokenizer) == (prompt, [([*ids_of("b"), EOS], None), ([*ids_of("c"), EOS], None)])


def test_a_teacher_reads_the_text_with_its_own_tokenizer_and_template(tokenizer):
    # No end after a turn, and another generation prompt.
    template = (
        TEMPLATE.replace(" + '<eos>'", "").replace("assistant", "system").replace("m['role']", "roles[m['role']]")
    )
    template = "{% set roles = {'user': 'user', 'assistant': 'system'} %}" + template
    other = toy_tokenizer(reverse=True, template=template)
    q, a = other.convert_tokens_to_ids(["q", "a"])
    assert [q, a] != ids_of("qa")
    record = {"messages": [user("q"), assistant("a")]}
    prompt_ids, response = retokenize(Group(0, (), (), raw=record), other)
    assert (prompt_ids, response.ids) == ((USER, q, SYSTEM), (a,))
    prompt_ids, response = retokenize(Group(0, (), (), raw={"prompt": "q", "completion": "a"}), other)
    assert (prompt_ids, response.ids) == ((q,), (a, EOS))


def test_a_teacher_cannot_read_ids(tokenizer):
    for record in ({"prompt_ids": [7], "response_ids": [8]}, {"prompt": "1", "response_ids": [8]}):
        with pytest.raises(UserError, match="record 3: field (prompt|response)_ids holds token ids"):
            retokenize(Group(3, (7,), (), raw=record), tokenizer)
    with pytest.raises(UserError, match=r"a.jsonl:4: field responses\[0\].response_ids holds token ids"):
        record = {"prompt": "1", "responses": [{"response_ids": [8], "reward": 1}]}
        retokenize(Group(3, (7,), (), raw=record), tokenizer, origin="a.jsonl:4")
