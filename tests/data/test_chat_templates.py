"""Check the tokens' text for ten kinds of published chat templates: SFT, preference, implicit prompts, rollouts.

Expectations are what a reader of the template writes by hand: prompt | response, scored parts of several in brackets.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from megalign.data.chat import template_words
from megalign.data.records import BadRecord, check_record
from megalign.data.tokenize import TextOptions, encode_prompt, encode_record
from megalign.schema import UserError
from tests.support.chat_templates import RESULT, TEMPLATES, TOOLS, TOOLS_TEXT, call, chat_tokenizer
from tests.support.toy_tokenizer import assistant, user

OPTIONS = TextOptions(date="2026-01-31")
REASONED = "<think>\nfor\n</think>\n\nfour"
SYSTEM = {"role": "system", "content": "be kind"}
TOKENIZERS = {name: chat_tokenizer(template) for name, template in TEMPLATES.items()}


def shown(tokenizer, ids, scored=None):
    """The tokens' text; scored runs in brackets where there is a mask."""
    if scored is None:
        return tokenizer.decode(ids)
    runs = itertools.groupby(zip(ids, scored, strict=True), key=lambda pair: pair[1])
    texts = [(on, tokenizer.decode([token for token, _ in pairs])) for on, pairs in runs]
    return "".join(f"[{text}]" if on else text for on, text in texts)


def encode(template, record, *, train_on="last_assistant", notes=None):
    """Prompt and responses as text; the prompt of a rollout is the same."""
    tokenizer = TOKENIZERS[template]
    form = check_record(record, template_words=template_words(tokenizer.chat_template))
    prompt, responses = encode_record(record, tokenizer, format=form, train_on=train_on, options=OPTIONS, notes=notes)
    asked = record["messages"][:-1] if "messages" in record and train_on == "last_assistant" else record.get("prompt")
    if isinstance(asked, list) and ("prompt" in record or asked[-1]["role"] != "assistant"):
        assert encode_prompt({**record, "prompt": asked}, tokenizer, options=OPTIONS) == prompt
    return [shown(tokenizer, prompt), *(shown(tokenizer, one.ids, one.scored) for one in responses)]


# What stands before the first user message, where it is not nothing.
DATED = "<|head|>system<|/head|>Today: 31 Jan 2026\n<|eot|>"
CHANNEL = "<|start|>system<|message|>Current date: 2026-01-31<|end|>"

# (template, the answer, prompt after its head, response)
ONE_ANSWER = [
    ("dated_tools", "four", DATED + "<|head|>user<|/head|>what<|eot|><|head|>assistant<|/head|>", "four<|eot|>"),
    (
        "dated_tools",
        REASONED,
        DATED + "<|head|>user<|/head|>what<|eot|><|head|>assistant<|/head|>",
        REASONED + "<|eot|>",
    ),
    ("chatml_tools", "four", "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n", "four<|im_end|>\n"),
    ("chatml_tools", "\nfour", "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n", "\nfour<|im_end|>\n"),
    ("thinking", REASONED, "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n", REASONED + "<|im_end|>\n"),
    (
        "thinking",
        "four",
        "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nfour<|im_end|>\n",
    ),
    ("opens_think", REASONED, "<s><|User|>what<|Assistant|><think>\n", "for\n</think>\n\nfour</s>"),
    ("opens_think", "for\n</think>\n\nfour", "<s><|User|>what<|Assistant|><think>\n", "for\n</think>\n\nfour</s>"),
    ("opens_think", "four", "<s><|User|>what<|Assistant|><think>\n", "four</s>"),
    ("inst", "four", "<s>[INST] what [/INST]", " four</s>"),
    ("model", "\nfour\n", "<s><turn>user\nwhat</turn>\n<turn>model\n", "four</turn>\n"),
    ("separated", "four", "<|user|><|sep|>what<|end|><|assistant|><|sep|>", "four<|end|></s>"),
    (
        "channels",
        "four",
        CHANNEL + "<|start|>user<|message|>what<|end|><|start|>assistant",
        "<|channel|>final<|message|>four<|return|>",
    ),
    ("listed", "four", "<|TURN|>user:what<|/TURN|><|TURN|>assistant:", "four<|/TURN|>"),
    ("marked", "four", "<|im_start|>user\nwhat<|im_end|><|im_start|>assistant\n", "say: four<|im_end|>"),
]


@pytest.mark.parametrize(("template", "answer", "prompt", "response"), ONE_ANSWER)
def test_one_answer_in_every_format(template, answer, prompt, response):
    asked, worse = [user("what")], "<think>\nno\n</think>\n\nfour"
    expected = [prompt, response]
    assert encode(template, {"messages": [*asked, assistant(answer)]}) == expected
    assert encode(template, {"messages": [*asked, assistant(answer)]}, train_on="all_assistant") == expected
    assert encode(template, {"prompt": asked, "completion": answer}) == expected
    assert encode(template, {"prompt": asked, "completion": [assistant(answer)]}) == expected
    explicit = encode(template, {"prompt": asked, "chosen": answer, "rejected": [assistant(worse)]})
    sides = {"chosen": [*asked, assistant(answer)], "rejected": [*asked, assistant(worse)]}
    assert encode(template, sides) == explicit
    assert explicit[:2] == expected
    # Samples that differ in reasoning alone must differ in tokens.
    assert "no\n</think>" in explicit[2] and explicit[2] != explicit[1]
    samples = [{"text": answer, "reward": 1.0}, {"text": [assistant(worse)], "reward": 0.0}]
    assert encode(template, {"prompt": asked, "responses": samples}) == explicit


TWO = [user("what"), assistant("four"), user("and"), assistant("five")]
# (template, prompt, response with scored parts in brackets), or the end of the refusal
SEVERAL_ANSWERS = [
    ("dated_tools", DATED + "<|head|>user<|/head|>what<|eot|><|head|>assistant<|/head|>",
     "[four<|eot|>]<|head|>user<|/head|>and<|eot|><|head|>assistant<|/head|>[five<|eot|>]"),
    ("chatml_tools", "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n",
     "[four<|im_end|>\n]<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n[five<|im_end|>\n]"),
    ("thinking", "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n",
     "[four<|im_end|>\n]<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nfive<|im_end|>\n]"),
    ("inst", "<s>[INST] what [/INST]", "[ four</s>][INST] and [/INST][ five</s>]"),
    ("model", "<s><turn>user\nwhat</turn>\n<turn>model\n",
     "[four</turn>\n]<turn>user\nand</turn>\n<turn>model\n[five</turn>\n]"),
    ("separated", "<|user|><|sep|>what<|end|><|assistant|><|sep|>",
     "[four<|end|>]<|user|><|sep|>and<|end|><|assistant|><|sep|>[five<|end|></s>]"),
    # The token that ends an earlier answer here is never sampled, so it is not scored.
    ("channels", CHANNEL + "<|start|>user<|message|>what<|end|><|start|>assistant",
     "[<|channel|>final<|message|>four]<|end|><|start|>user<|message|>and<|end|><|start|>assistant"
     "[<|channel|>final<|message|>five<|return|>]"),
    ("listed", "<|TURN|>user:what<|/TURN|><|TURN|>assistant:",
     "[four<|/TURN|>]<|TURN|>user:and<|/TURN|><|TURN|>assistant:[five<|/TURN|>]"),
    ("marked", "<|im_start|>user\nwhat<|im_end|><|im_start|>assistant\n",
     "[four]<|end|><|im_start|>user\nand<|im_end|><|im_start|>assistant\n[say: five<|im_end|>]"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "prompt", "response"), SEVERAL_ANSWERS)
def test_every_answer_by_mask(template, prompt, response):
    assert encode(template, {"messages": TWO}, train_on="all_assistant") == [prompt, response]
    assert encode(template, {"prompt": TWO[:1], "completion": TWO[1:]}) == [prompt, response]


@pytest.mark.parametrize("template", TEMPLATES)
def test_last_answer_after_others_follows_what_a_rollout_samples_from(template):
    prompt, response = encode(template, {"messages": TWO})
    assert "four" in prompt and "and" in prompt and "five" in response and "four" not in response


def test_earlier_reasoning_that_the_template_drops_is_in_no_prompt_and_refused_where_it_is_trained_on():
    turns = [user("what"), assistant(REASONED), user("and"), assistant("<think>\nsince\n</think>\n\nfive")]
    for template in ("thinking", "opens_think"):
        prompt, response = encode(template, {"messages": turns})
        assert "for\n" not in prompt and "since\n</think>\n\nfive" in response
        with pytest.raises(
            BadRecord, match="field messages: the chat template renders earlier turns differently"
        ) as error:
            encode(template, {"messages": turns}, train_on="all_assistant")
        assert "drops '<think>'" in str(error.value) or "the prompt of an answer has '<think>\\n'" in str(error.value)
        assert "\n" not in str(error.value)


def test_reasoning_in_a_field_of_its_own():
    record = {"messages": [user("what"), assistant("four") | {"reasoning_content": "for"}]}
    assert encode("thinking", record)[1] == REASONED + "<|im_end|>\n"
    # transformers hands `reasoning_content` on as `thinking`, too.
    analysis = "<|channel|>analysis<|message|>for<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>"
    assert encode("channels", record)[1] == analysis
    with pytest.raises(BadRecord, match="field messages: the chat template drops 'for' of the answer"):
        encode("chatml_tools", record)


def test_a_tag_that_the_generation_prompt_opens_is_not_opened_again():
    # This template closes the reasoning that it knows of, none, and writes content as it is.
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    template += "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    template += "{{ m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    tokenizer = chat_tokenizer(template)
    for answer, text in ((assistant(REASONED), REASONED), (assistant("four") | {"reasoning_content": "for"}, REASONED)):
        prompt, (response,) = encode_record({"messages": [user("what"), answer]}, tokenizer, format="messages")
        assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
        assert tokenizer.decode(response.ids) == text.removeprefix("<think>\n") + "<|im_end|>"


def test_reasoning_that_was_cut_follows_the_generation_prompt_as_it_was_sampled():
    # The template would write empty reasoning before it.
    cut, notes = "<think>\nfor", Counter()
    record = {"prompt": [user("what")], "responses": [{"text": cut, "reward": 0.0}, {"text": REASONED, "reward": 1.0}]}
    assert encode("thinking", record, notes=notes)[1:] == ["<think>\nfor<|im_end|>\n", REASONED + "<|im_end|>\n"]
    assert notes.total() == 1
    assert encode("chatml_tools", record, notes=notes)[1:] == [cut + "<|im_end|>\n", REASONED + "<|im_end|>\n"]
    assert notes.total() == 1


def test_reasoning_in_a_field_that_the_template_drops_says_where_to_write_it():
    record = {"messages": [user("what"), assistant("four") | {"reasoning_content": "for"}]}
    with pytest.raises(BadRecord, match="such as the reasoning inside content, as <think>...</think> before the"):
        encode("opens_think", record)


def test_what_was_decided_is_counted():
    notes = Counter()
    encode("opens_think", {"prompt": [user("what")], "chosen": REASONED, "rejected": "four"}, notes=notes)
    encode("chatml_tools", {"messages": [user("what"), assistant("\nfour")]}, notes=notes)
    assert notes == {
        "answers appended verbatim to the generation prompt, because the chat template would change them": 2,
        "answers that do not close the <think> that the generation prompt opens": 1,
        "responses tokenised apart from their prompt, because tokens would merge across the border": 1,
    }


TOOL_TALK = [user("sum"), call(), RESULT, assistant("It is two")]
IN_JSON = '{"a": 1}'
CHATML_CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
# (template, before the user's words, the call as it is trained on)
TOOL_CALLS = [
    ("dated_tools", TOOLS_TEXT + "\nsum", '{"name": "add", "parameters": {"a": 1}}<|eot|>'),
    ("chatml_tools", f"<tools>{TOOLS_TEXT}</tools>", CHATML_CALL),
    ("inst", "[TOOLS]" + TOOLS_TEXT, '[CALL]{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}</s>'),
    ("channels", f"developer<|message|>{TOOLS_TEXT}<|end|>", ' to=add<|message|>{"a": 1}<|call|>'),
    ("listed", "## Tools " + TOOLS_TEXT, 'Action:[{"tool_name": "add", "parameters": {"a": 1}}]<|/TURN|>'),
]  # fmt: skip


@pytest.mark.parametrize(("template", "given", "called"), TOOL_CALLS)
def test_tools_and_calls(template, given, called):
    record = {"tools": TOOLS, "messages": TOOL_TALK[:2]}
    prompt, response = encode(template, record)
    assert given in prompt and response == called
    assert encode(template, {**record, "tools": TOOLS_TEXT}) == [prompt, response]
    assert encode(template, {"tools": TOOLS, "prompt": TOOL_TALK[:1], "completion": [call()]}) == [prompt, response]
    # Arguments as JSON text, as OpenAI writes them, are no quoted strings.
    assert encode(template, {"tools": TOOLS, "messages": [user("sum"), call(IN_JSON)]}) == [prompt, response]
    # The whole talk: the call and the last answer are trained on, the result is not.
    prompt, response = encode(template, {"tools": TOOLS, "messages": TOOL_TALK}, train_on="all_assistant")
    assert response.startswith(f"[{called}]")
    result, answer = response.removeprefix(f"[{called}]").rsplit("[", 1)
    assert "two" in result and "It is two" in answer and answer.endswith("]")
    prompt, response = encode(template, {"tools": TOOLS, "messages": TOOL_TALK})
    assert called.removesuffix("</s>") in prompt and "It is two" in response


def test_calls_without_function_or_arguments_and_arguments_that_are_no_object():
    def answer(**inner):
        return encode("chatml_tools", {"messages": [user("sum"), {"role": "assistant", "tool_calls": [inner]}]})[1]

    for arguments in ({"a": 1}, IN_JSON):
        assert answer(name="add", arguments=arguments) == CHATML_CALL
        assert answer(function={"name": "add", "arguments": arguments}) == CHATML_CALL
    for inner in ({"name": "add"}, {"name": "add", "arguments": ""}, {"name": "add", "arguments": {}}):
        assert answer(function=inner) == CHATML_CALL.replace(IN_JSON, "{}")
    # The template would quote it: "arguments": "[1]".
    for arguments in ("[1]", "{a: 1}"):
        with pytest.raises(BadRecord, match="field messages: arguments of tool_calls is .*; must be an object, or one"):
            answer(function={"name": "add", "arguments": arguments})


def test_a_template_that_joins_strings_gets_arguments_as_json():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    template += "{{ c.function.name + ': ' + c.function.arguments }}{% endfor %}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    tokenizer, notes = chat_tokenizer(template), Counter()
    for arguments in ({"a": 1}, IN_JSON):
        record = {"messages": [user("sum"), call(arguments)]}
        _, (response,) = encode_record(record, tokenizer, format="messages", notes=notes)
        assert tokenizer.decode(response.ids) == "add: " + IN_JSON
    told = "records whose tool-call arguments were written as JSON strings, because the template takes no objects"
    assert notes == {told: 1}


def test_calls_without_the_tools_field_and_content_beside_them():
    assert encode("chatml_tools", {"messages": [user("sum"), call(content="I add.")]})[1] == "I add." + CHATML_CALL
    with pytest.raises(BadRecord, match=r"field messages: the chat template drops 'I add\.' of the answer"):
        encode("dated_tools", {"messages": [user("sum"), call(content="I add.")]})


def test_a_dropped_turn_is_told_from_the_same_words_elsewhere():
    # The result stands in the question, the function and its argument among the tools and in the question.
    asked = user("add a = 1 to 1, is it two?")
    with pytest.raises(BadRecord, match=r"field messages\[1\].content: the chat template does not render the tool"):
        encode("separated", {"messages": [asked, RESULT, assistant("yes")]})
    only_tools = "{{ tools | tojson }}{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content or '') }}{% endfor %}"
    record = {"tools": TOOLS, "messages": [asked, call(), RESULT, assistant("yes")]}
    for turns in (record["messages"], [asked, call({}), RESULT, assistant("yes")]):
        with pytest.raises(BadRecord, match=r"field messages\[1\].tool_calls: the chat template does not render 'add'"):
            encode_record({**record, "messages": turns}, chat_tokenizer(only_tools), format="messages")
    assert "Action" in encode("listed", record)[0]


SUM, FOUR = user("sum"), assistant("four")
SHORT_ID = {**call(), "tool_calls": [{**call()["tool_calls"][0], "id": "1"}]}
NO_NAME = {"role": "assistant", "tool_calls": [{"function": {}}]}
REFUSES, VARIABLE = "field messages: the chat template refuses the conversation", "field chat_template_kwargs."
NOT_READ = "the chat template does not read"


def talk(*turns, **more):
    return {"messages": list(turns), **more}


def told(**variables):
    return talk(SUM, FOUR, chat_template_kwargs=variables)


# (template, record, the refusal)
DROPPED = [
    ("model", talk(SUM, FOUR, tools=TOOLS), f"field tools: {NOT_READ} them"),
    ("opens_think", talk(SUM, FOUR, tools=TOOLS), f"field tools: {NOT_READ} them"),
    ("separated", talk(*TOOL_TALK), "field messages[1].tool_calls: the chat template does not render 'add'"),
    ("separated", talk(SUM, RESULT, FOUR), "field messages[1].content: the chat template does not render the tool"),
    ("opens_think", talk(SUM, call("{}")), "field messages: the chat template"),
    ("inst", talk(SYSTEM, SUM, FOUR), f"{REFUSES} (only user,"),
    ("model", talk(SYSTEM, SUM, FOUR), f"{REFUSES} (System role not supported)"),
    ("inst", talk(SUM, SHORT_ID, tools=TOOLS), f"{REFUSES} (tool call ids must"),
    ("chatml_tools", told(enable_thinking=False), f"{VARIABLE}enable_thinking: {NOT_READ} it"),
    ("thinking", told(add_generation_prompt=True), f"{VARIABLE}add_generation_prompt is True"),
    ("thinking", told(chat_template="x"), f"{VARIABLE}chat_template is 'x'"),
    # Words of the template that are no variables of it.
    ("thinking", told(content="x"), f"{VARIABLE}content: {NOT_READ} it"),
    ("marked", told(generation=True), f"{VARIABLE}generation: {NOT_READ} it"),
    ("channels", told(strftime_now="x"), f"{VARIABLE}strftime_now is 'x'"),
    ("listed", told(documents=[]), f"{VARIABLE}documents: {NOT_READ} it"),
    ("listed", told(chat_template="rags"), f"{VARIABLE}chat_template is 'rags'; must be default, rag, tool_use"),
    ("thinking", {"prompt": "what", "completion": "four", "tools": TOOLS}, "field tools is"),
    ("thinking", talk(SUM, FOUR, tools="add"), "field tools is 'add'; must be a list of JSON schemas"),
    ("thinking", talk(SUM, FOUR, tools=["add"]), "field tools is ['add']"),
    ("thinking", talk(SUM, FOUR, chat_template_kwargs=[1]), "field chat_template_kwargs is [1]"),
    ("thinking", talk(SUM, NO_NAME), "field messages[1].tool_calls[0] is"),
    ("thinking", talk(SUM, call(7)), "field messages[1].tool_calls[0].function.arguments is 7"),
    ("thinking", talk({**call(), **SUM}, FOUR), "field messages[0].tool_calls is"),
    ("thinking", talk(SUM, {"role": "assistant", "content": None}), "field messages[1].content is None"),
    ("thinking", talk(SUM, FOUR | {"mood": "good"}), "field messages[1].mood is not known"),
    ("thinking", talk(SUM, FOUR | {"reasoning_content": 3}), "field messages[1].reasoning_content is 3"),
    ("thinking", {"prompt": [SUM, call()], "completion": "four"}, "field prompt[1] is"),
]


@pytest.mark.parametrize(("template", "record", "message"), DROPPED)
def test_what_would_be_dropped_is_refused_in_one_line(template, record, message):
    with pytest.raises(BadRecord) as error:
        encode(template, record)
    assert str(error.value).startswith(message)
    assert "must be " in str(error.value) and "\n" not in str(error.value)


def test_variables_and_named_templates_by_record():
    plain = {"messages": [user("what"), assistant("four")]}
    prompt, response = encode("thinking", {**plain, "chat_template_kwargs": {"enable_thinking": False}})
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n") and response == "four<|im_end|>\n"
    documents = [{"title": "t", "text": "x"}]
    variables = {"chat_template": "rag", "documents": documents}
    assert encode("listed", {**plain, "chat_template_kwargs": variables})[0].startswith("Document t: x<|TURN|>")


# (template, the prefill, its prompt's end, response to " four")
PREFILLS = [
    ("dated_tools", "It is", "assistant<|/head|>It is", " four<|eot|>"),
    ("chatml_tools", "It is", "assistant\nIt is", " four<|im_end|>\n"),
    ("thinking", "It is", "assistant\n<think>\n\n</think>\n\nIt is", " four<|im_end|>\n"),
    ("thinking", "<think>\nIt is", "assistant\n<think>\nIt is", " four<|im_end|>\n"),
    ("opens_think", "<think>\nIt is", "<|Assistant|><think>\nIt is", " four</s>"),
    ("opens_think", "<think>\nx\n</think>\nIt is", "<|Assistant|><think>\nx\n</think>\nIt is", " four</s>"),
    ("inst", "It is", "[/INST] It is", " four</s>"),
    ("model", "It is", "<turn>model\nIt is", " four</turn>\n"),
    ("separated", "It is", "<|sep|>It is", " four<|end|></s>"),
    ("channels", "It is", "<|channel|>final<|message|>It is", " four<|return|>"),
    ("listed", "It is", "assistant:It is", " four<|/TURN|>"),
    ("marked", "It is", "assistant\nsay: It is", " four<|im_end|>"),
]


@pytest.mark.parametrize(("template", "start", "prompt", "response"), PREFILLS)
def test_a_prompt_that_ends_with_the_assistant_is_continued(template, start, prompt, response):
    asked = [user("what"), assistant(start)]
    encoded = encode(template, {"prompt": asked, "completion": " four"})
    assert encoded[0].endswith(prompt) and encoded[1] == response
    assert encode(template, {"prompt": asked, "completion": [assistant(" four")]}) == encoded
    sampled = encode_prompt({"prompt": asked}, TOKENIZERS[template], options=OPTIONS)
    assert TOKENIZERS[template].decode(sampled) == encoded[0]
    sides = encode(template, {"prompt": asked, "chosen": " four", "rejected": " five"})
    assert sides[:2] == encoded and sides[2] == response.replace("four", "five")


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_beginning_begins_nothing(template):
    empty = {"prompt": [user("what"), assistant("")], "completion": "four"}
    assert encode(template, empty) == encode(template, {"prompt": [user("what")], "completion": "four"})


@pytest.mark.parametrize("template", TEMPLATES)
def test_reasoning_of_a_beginning_is_written_or_refused(template):
    asked = {"prompt": [user("what"), assistant("It is") | {"reasoning_content": "for"}]}
    if template in ("thinking", "channels"):
        prompt = TOKENIZERS[template].decode(encode_prompt(asked, TOKENIZERS[template], options=OPTIONS))
        assert "for" in prompt and prompt.endswith("It is")
    else:
        with pytest.raises(BadRecord, match=r"field prompt\[1\] is .*; must be a beginning that the chat template"):
            encode_prompt(asked, TOKENIZERS[template], options=OPTIONS)


def test_prefill_of_a_talk_with_several_answers():
    record = {"prompt": [user("what"), assistant("It is")], "completion": [assistant(" four"), *TWO[2:]]}
    prompt, response = encode("chatml_tools", record)
    assert prompt.endswith("assistant\nIt is")
    assert response == "[ four<|im_end|>\n]<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n[five<|im_end|>\n]"


def test_generation_blocks_tell_what_is_trained_on_where_nothing_else_can():
    # The earlier call stands between words that the last one does not have, at both ends.
    talk = [user("sum"), call(), {**RESULT}, assistant("two")]
    response = encode("marked", {"messages": talk}, train_on="all_assistant")[1]
    expected = (
        '[call {"name": "add", "arguments": {"a": 1}}<|end|>]<|im_start|>tool\ntwo<|im_end|><|im_start|>assistant\n'
    )
    assert response == expected + "[say: two<|im_end|>]"


def test_day():
    record = {"messages": [user("what"), assistant("four")]}
    early = TextOptions(date="2025-06-01")
    for template, day in (("dated_tools", "01 Jun 2025"), ("channels", "2025-06-01")):
        tokenizer = TOKENIZERS[template]
        prompt, _ = encode_record(record, tokenizer, format="messages", options=early)
        assert day in tokenizer.decode(prompt)
        assert encode_prompt({"prompt": [user("what")]}, tokenizer, options=early) == prompt
    formats = "{{ strftime_now('%A %-d %B %Y %H:%M %j 100%%|') }}{{ messages[0].content }}"
    prompt = encode_prompt({"prompt": [user("x")]}, chat_tokenizer(formats), options=early)
    assert TOKENIZERS["model"].decode(prompt) == "Sunday 1 June 2025 00:00 152 100%|x"


def test_a_list_without_a_default_and_templates_that_are_none():
    record = {"messages": [user("what"), assistant("four")]}
    for template, message in (
        ({"tool_use": "", "rag": ""}, r"is a list \(rag, tool_use\) without a default; must be "),
        ({"default": 3}, "is a dict; must be text, or texts by name"),
        ("{% if %}", r"is not valid \(line 1: .*; must be a Jinja template"),
    ):
        with pytest.raises(UserError, match=message):
            encode_record(record, chat_tokenizer(template), format="messages")
    named = {**record, "chat_template_kwargs": {"chat_template": "rag"}}
    tokenizer = chat_tokenizer({"rag": TEMPLATES["listed"]["default"]})
    assert (
        tokenizer.decode(encode_record(named, tokenizer, format="messages")[0])
        == "<|TURN|>user:what<|/TURN|><|TURN|>assistant:"
    )


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0].mood.level }}", "refuses the conversation ('dict object' has no attribute 'mood')"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ '%(mood)s' % {} }}", "KeyError: 'mood'"),
        ("{{ 'x'.encode('ascii').decode('utf-16') }}", "UnicodeDecodeError: "),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError: "),
    ],
)
def test_errors_inside_a_template_are_one_line(broken, error):
    with pytest.raises(BadRecord) as caught:
        encode_record({"messages": TWO}, chat_tokenizer(broken), format="messages")
    assert str(caught.value).startswith("field messages: the chat template ") and error in str(caught.value)
    assert "\n" not in str(caught.value) and "must be " in str(caught.value)
