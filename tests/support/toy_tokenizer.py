"""A tokenizer of single characters that nothing has to be downloaded for."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
EOS, UNK, USER, ASSISTANT, SYSTEM = range(5)
CHARACTERS = string.printable
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
# <role>content<eos>; the generation prompt is <assistant>.
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier answers are forgotten once another turn follows, as reasoning models' templates do.
FORGETFUL = TEMPLATE.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '')")


def toy_tokenizer(
    *, template: str | None = TEMPLATE, eos: bool = True, reverse: bool = False
) -> PreTrainedTokenizerFast:
    """reverse: other ids for the same characters, as another model would have."""
    characters = CHARACTERS[::-1] if reverse else CHARACTERS
    vocab = {token: number for number, token in enumerate(SPECIAL + list(characters))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    ends = {"eos_token": "<eos>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", additional_special_tokens=SPECIAL[2:] + ["<eos>"], **ends
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(text: str) -> list[int]:
    """Token ids that the toy tokenizer gives plain text, by a table of its own."""
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


def user(content: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}
