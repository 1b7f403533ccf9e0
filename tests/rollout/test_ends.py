"""Tokens that the tokenizer has and the model lacks: padding among them is harmless, what ends a response is not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import transformers

from megalign.rollout.ends import check_ends
from megalign.schema import UserError
from tests.support.tiny_jobs import VOCAB_SIZE, metrics, numbers, round_sections, train, write_config, write_model


def test_padding_without_an_embedding_changes_nothing(tmp_path):
    """An added [PAD] behind the model's vocabulary, in the tokenizer and in config.json."""
    write_model(tmp_path / "model", tokenizer=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"<more{number}>" for number in range(VOCAB_SIZE - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "model")
    config = write_config(tmp_path, **round_sections(tmp_path, rounds=1))
    assert train(config, f"run.dir={tmp_path}/before") == 0
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCAB_SIZE
    tokenizer.save_pretrained(tmp_path / "model")
    about = tmp_path / "model" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"pad_token_id": VOCAB_SIZE}))
    assert train(config, f"run.dir={tmp_path}/after") == 0
    before, after = (numbers(metrics(tmp_path / run)) for run in ("before", "after"))
    assert before == after and len(after) == 2


@pytest.mark.parametrize(
    ("settings", "own", "wrong"),
    [
        ({"eos_token_id": 53}, 0, "generation_config.json: eos_token_id is 53; must be .* below 53"),
        ({"eos_token_id": [0, 99]}, 0, r"eos_token_id is \[0, 99\]"),
        ({"eos_token_id": [0, -1]}, 0, "eos_token_id is"),
        ({"eos_token_id": "</s>"}, 0, "eos_token_id is '</s>'"),
        ({}, 53, "the tokenizer's end-of-sequence token '<end>' is 53"),
        ({}, None, "no end-of-sequence token"),
        (None, 0, "config.json: eos_token_id is 77"),  # of config.json where there are no generation settings
        ({"eos_token_id": [0, 52]}, None, None),
        ({}, 52, None),
    ],
)
def test_ends_of_responses_must_be_the_models(tmp_path, settings, own, wrong):
    (tmp_path / "config.json").write_text('{"eos_token_id": 77}')
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = SimpleNamespace(eos_token_id=own, eos_token="<end>")
    if wrong is None:
        check_ends(tmp_path, tokenizer, vocab_size=53)
        return
    with pytest.raises(UserError, match=wrong):
        check_ends(tmp_path, tokenizer, vocab_size=53)
