"""Six kinds of tokenizers, as published models have them, trained here on a few hundred lines in a second."""

import random

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the a sum of two numbers is what colour sky blue grass green question answer weather in Paris Rome please tell "
    "me you can help with this that and not or yes no red one three four five name city tool call assistant user"
)
# <|im_start|>role ... <|im_end|>, tools in the system turn, calls and their results as Qwen writes them.
CHATML = """\
{%- if tools %}<|im_start|>system
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}

{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m['content'] or '' }}
{%- for call in m.get('tool_calls') or [] %}
<tool_call>
{{ call['function'] | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endgeneration %}
{%- elif m['role'] == 'tool' %}<|im_start|>user
<tool_response>
{{ m['content'] }}
</tool_response><|im_end|>
{% elif not (tools and loop.first and m['role'] == 'system') %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{{- '<|eot_id|>' }}{%- endif %}
{%- for m in messages %}
{%- if m['role'] == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}
{%- if m.get('tool_calls') %}{{- m['tool_calls'][0]['function'] | tojson }}
{%- else %}{{- m['content'] | trim }}{%- endif %}{{- '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- m['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# The answer stands behind a blank that no generation prompt holds, and tools before the user's last message.
MISTRAL = """\
{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}
{%- if tools and m == asked[-1] %}{{- '[TOOLS] ' }}{{- tools | tojson }}{{- '[/TOOLS]' }}{%- endif %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'tool' %}{{- '[RESULT] ' + m['content'] + '[/RESULT]' }}
{%- elif m['role'] == 'assistant' %}{% generation %}
{%- if m.get('tool_calls') %}{{- '[CALLS] ' }}{{- m['tool_calls'][0]['function'] | tojson }}
{%- else %}{{- ' ' + m['content'] }}{%- endif %}{{- eos_token }}{% endgeneration %}
{%- else %}{{- raise_exception('system turns are not supported') }}
{%- endif %}
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{%- if role == 'model' %}{{- '<start_of_turn>model\\n' }}{% generation %}
{{- m['content'] | trim + '<end_of_turn>\\n' }}{% endgeneration %}
{%- else %}{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PLAIN = """\
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}{{- '<assistant>' }}{% generation %}{{- m['content'] + eos_token }}{% endgeneration %}
{%- else %}{{- '<' + m['role'] + '>' + m['content'] + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""


def corpus() -> list[str]:
    """Sentences, sums and JSON, the same at each call."""
    draw = random.Random(7)
    words = WORDS.split()
    lines = [" ".join(draw.choices(words, k=draw.randrange(3, 12))).capitalize() + "." for _ in range(200)]
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(200)]
    lines += [f"{first} + {second} = {first + second}\n{first}+{second}={first + second}\n\n" for first, second in sums]
    lines += [f"[INST] What {word} is it? [/INST]" for word in words]
    return lines + ['{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}'] * 20


def wrapped(core: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers around a core, with a chat template."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def _with_ends(core: Tokenizer, template: str) -> None:
    """The special tokens that the tokenizer itself puts around a text."""
    names = [name for name in template.split() if name != "$A"]
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, core.token_to_id(name)) for name in names]
    )


def _byte_level(special: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    return core


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2, Qwen: bytes, no start token."""
    core = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return wrapped(core, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def byte_level_with_bos() -> PreTrainedTokenizerFast:
    """Llama 3: bytes, a start token before every text."""
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    core = _byte_level(special)
    _with_ends(core, "<|begin_of_text|> $A")
    return wrapped(core, LLAMA3, bos_token=special[0], eos_token=special[1])


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def metaspace_bpe() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: SentencePiece's BPE with a blank put before a text, bytes for what is unknown."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *_byte_tokens()]
    core.train_from_iterator(
        [word for line in corpus() for word in line.replace(" ", " \u2581").split(" ")],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
    )
    _with_ends(core, "<s> $A")
    return wrapped(core, MISTRAL, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram_with_bos() -> PreTrainedTokenizerFast:
    """Gemma: SentencePiece without a blank before a text, a start token, bytes for what is unknown."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581[^\u2581]*|[^\u2581]+"), "isolated")
    core.decoder = decoders.Replace("\u2581", " ")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    core.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    _with_ends(core, "<bos> $A")
    return wrapped(core, GEMMA, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def unigram_with_eos() -> PreTrainedTokenizerFast:
    """T5: SentencePiece with a blank before a text and an end token behind it."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", "<tool>"]
    core.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    _with_ends(core, "$A </s>")
    return wrapped(core, PLAIN, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: pieces of lower-cased words between two tokens; blanks and line ends are lost."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", "<system>", "<tool>"]
    core.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    _with_ends(core, "[CLS] $A [SEP]")
    return wrapped(core, PLAIN, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]")


KINDS = {
    "byte-level BPE": byte_level,
    "byte-level BPE with a start token": byte_level_with_bos,
    "SentencePiece BPE with a blank in front": metaspace_bpe,
    "SentencePiece unigram with a start token": unigram_with_bos,
    "SentencePiece unigram with an end token": unigram_with_eos,
    "WordPiece": word_piece,
}
