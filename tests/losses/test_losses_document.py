"""docs/losses.md has a section a loss, with every field, default and metric by name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from megalign.losses import LOSSES, choose_loss, loss_function, prepared
from megalign.losses.random_scores import random_scores
from megalign.schema import key_names
from tests.support.loss_cases import LOSSES as CASES
from tests.support.loss_cases import USERS
from tests.support.tiny_jobs import ROOT

TEXT = (ROOT / "docs" / "losses.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", TEXT, flags=re.DOTALL | re.MULTILINE))
BUILT_IN = [raw for name, (raw, _) in CASES.items() if name not in USERS]


def test_every_loss_has_a_section_and_a_row_and_the_authors_come_first():
    assert set(SECTIONS) == set(LOSSES)
    assert list(SECTIONS)[:3] == ["gvpo", "epa", "poft"]
    for name in LOSSES:
        assert f"| [`{name}`](#{name}) |" in TEXT
        assert "$$" in SECTIONS[name] and (name == "sft" or "https://arxiv.org/abs/" in SECTIONS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_every_field_is_there_with_its_default(name):
    config = LOSSES[name].config
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTIONS[name], flags=re.MULTILINE))
    defaults = config(name=name).model_dump(by_alias=True)
    fields = [key for key in key_names(config) if key != "name"]
    assert rows == {key: "null" if defaults[key] is None else str(defaults[key]) for key in fields}


@pytest.mark.parametrize("raw", BUILT_IN, ids=lambda raw: " ".join(map(str, raw.values())))
def test_every_metric_is_named(raw):
    cfg = choose_loss(raw)
    traits = cfg.traits()
    scores = prepared(random_scores(traits, rewards=traits.pairing.kind != "single"), cfg)
    names = set(loss_function(cfg)(replace(scores), cfg).metrics)
    names |= {name for name, wanted in (("entropy", traits.entropy), ("token_accuracy", traits.accuracy)) if wanted}
    assert {name for name in names if f"`{name}`" not in SECTIONS[cfg.name]} == set()
