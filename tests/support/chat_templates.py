"""Ten chat templates in the spirit of published ones, each with the habit it is known for, and a tokenizer for them."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TAGS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eot|>", "<|head|>", "<|/head|>"),
    *("<|Assistant|>", "<|User|>", "[INST]", "[/INST]", "<turn>", "</turn>", "<|end|>", "<|start|>", "<|message|>"),
    *("<|channel|>", "<|return|>", "<|call|>", "<|sep|>", "<|TURN|>", "<|/TURN|>", "<|user|>"),
]
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + ({'name': c.function.name, "
    "'arguments': c.function.arguments} | tojson) + '</tool_call>' }}{% endfor %}"
)

# The day in the system part; tools in front of the first user message; content beside tool calls is dropped.
DATED_TOOLS = """{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif -%}
{{ '<|head|>system<|/head|>Today: ' + today + '\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif -%}
{{ '<|eot|>' }}
{%- if tools %}{{ '<|head|>user<|/head|>' + (tools | tojson) + '\n' + messages[0].content | trim + '<|eot|>' }}
{%- set messages = messages[1:] %}{% endif -%}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once!') }}{% endif -%}
{{ '<|head|>assistant<|/head|>{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot|>' }}
{%- elif m.role == 'tool' %}{{ '<|head|>ipython<|/head|>' + (m.content | tojson) + '<|eot|>' }}
{%- else %}{{ '<|head|>' + m.role + '<|/head|>' + m.content | trim + '<|eot|>' }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"""

# ChatML: tools in the system part, calls as JSON in tags, results from the user.
CHATML_TOOLS = (
    """{% if tools %}{{ '<|im_start|>system\n<tools>' + (tools | tojson) + '</tools><|im_end|>\n' }}{% endif %}
{%- for m in messages -%}
{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}
{%- if m.role == 'tool' %}{{ '<result>' + m.content + '</result>' }}
{%- elif m.content %}{{ m.content }}{% endif -%}"""
    + CALLS
    + """{{ '<|im_end|>\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Reasoning of the last answer alone, an empty one where it has none; enable_thinking: false writes the empty one.
THINKING = (
    """{% set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages %}
{%- set content = m.content or '' %}{% set reasoning = m.reasoning_content or '' %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) -%}
{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif -%}
{{ content }}"""
    + CALLS
    + """{{ '<|im_end|>\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
)

# Everything before </think> is dropped, and the generation prompt opens <think>; system texts are joined in front.
OPENS_THINK = """{{ bos_token }}
{%- for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor -%}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}
{%- elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# No generation prompt but [/INST], a blank in front of every answer, ids of calls of nine characters.
INST = """{{ bos_token }}{% if tools %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'tool' %}{{ '[RESULT]' + ({'content': m.content, 'call_id': m.tool_call_id} | tojson) }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- for c in m.tool_calls %}
{%- if not c.id or c.id | length != 9 %}{{ raise_exception('tool call ids must have 9 characters') }}{% endif -%}
{{ '[CALL]' + ({'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson) }}
{%- endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- else %}{{ raise_exception('only user, assistant and tool roles are supported') }}{% endif %}
{%- endfor %}"""

# The assistant is called model, a system message is refused, roles alternate, texts are trimmed.
MODEL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '</turn>\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""

# Unknown roles, such as tool, are left out in silence; the end-of-text token closes what is not to be continued.
SEPARATED = """{% for m in messages %}
{%- if m.role in ('system', 'user', 'assistant') %}{{ '<|' + m.role + '|><|sep|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|assistant|><|sep|>' }}{% else %}{{ eos_token }}{% endif %}"""

# Channels; the day; reasoning in `thinking`, written for the last turn alone; <|return|> ends that one, <|end|> others.
CHANNELS = """{% macro system() %}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{% endmacro -%}
{{ '<|start|>system<|message|>' + system() + '<|end|>' }}
{%- if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif -%}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif -%}
{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '<|call|>' }}
{%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif -%}
{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# A list: default takes no tools, tool_use does, rag takes documents.
_TURNS = """{% for m in messages %}{{ '<|TURN|>' + m.role + ':' + (m.content or '') }}{% for c in m.tool_calls or [] %}
{{- 'Action:' + ([{'tool_name': c.function.name, 'parameters': c.function.arguments}] | tojson) }}{% endfor -%}
{{ '<|/TURN|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|TURN|>assistant:' }}{% endif %}"""
LISTED = {
    "default": _TURNS,
    "tool_use": "{{ '## Tools ' + (tools | tojson) }}" + _TURNS,
    "rag": "{% for d in documents %}{{ 'Document ' + d.title + ': ' + d.text }}{% endfor %}" + _TURNS,
}

# Marks what is generated; earlier answers lose what the last one is framed by, calls too.
MARKED = """{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}
{%- if loop.last %}{{ 'say: ' }}{% endif %}{{ (m.content or '') | trim }}
{%- for c in m.tool_calls or [] %}{{ ('call ' if loop.last else 'called ') + (c.function | tojson) }}{% endfor -%}
{{ '<|im_end|>' if loop.last else '<|end|>' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES: dict[str, str | dict[str, str]] = {
    "dated_tools": DATED_TOOLS,
    "chatml_tools": CHATML_TOOLS,
    "thinking": THINKING,
    "opens_think": OPENS_THINK,
    "inst": INST,
    "model": MODEL,
    "separated": SEPARATED,
    "channels": CHANNELS,
    "listed": LISTED,
    "marked": MARKED,
}


def chat_tokenizer(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with every tag as one token; two newlines merge, so that borders matter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n")[0][0]
    vocab = {letter: number for number, letter in enumerate([*letters, newline * 2])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[(newline, newline)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", additional_special_tokens=TAGS[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TOOLS_TEXT = json.dumps(TOOLS)


def call(arguments: object = None, **more: object) -> dict[str, object]:
    """Return an assistant turn that calls the tool."""
    function = {"name": "add", "arguments": {"a": 1} if arguments is None else arguments}
    return {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}], **more}


RESULT = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "two"}
