from datetime import date, datetime

import pytest
from pydantic import ValidationError

from megalign.data.config import DataConfig
from megalign.schema import first_problem

REQUIRED = {"path": "a.jsonl", "max_length": 8, "groups_per_step": 2, "tokens_per_micro_batch": 4}


def test_defaults():
    cfg = DataConfig(**REQUIRED)
    assert cfg.model_dump() == {
        **REQUIRED,
        "sources": None,
        "format": "auto",
        "packing": True,
        "shuffle": True,
        "on_bad_record": "stop",
        "extra_fields": "error",
        "train_on": "last_assistant",
        "filter": None,
        "special_tokens": "auto",
        "date": None,
    }


def test_filter_and_sources():
    rest = {key: value for key, value in REQUIRED.items() if key != "path"}
    cfg = DataConfig.model_validate({**rest, "filter": {"teacher_score_keep": 0.8}, "sources": [{"path": "a"}]})
    assert cfg.filter is not None and cfg.filter.teacher_score_keep == 0.8
    assert cfg.sources is not None and cfg.sources[0].weight == 1.0
    assert DataConfig.model_validate({**rest, "filter": "none"}).filter is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sources": [{"path": "b"}]}, "sources"),
        ({"path": None, "sources": []}, "sources"),
        ({"path": None, "sources": [{"path": "b", "weight": 0}]}, "sources.0.weight"),
        ({"path": None, "sources": [{"path": "b", "weight": float("inf")}]}, "sources.0.weight"),
        ({"path": ""}, "path"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": "8"}, "max_length"),
        ({"groups_per_step": True}, "groups_per_step"),
        ({"tokens_per_micro_batch": -1}, "tokens_per_micro_batch"),
        ({"packing": 1}, "packing"),
        ({"format": "jsonl"}, "format"),
        ({"train_on": "user"}, "train_on"),
        ({"on_bad_record": "drop"}, "on_bad_record"),
        ({"extra_fields": "allow"}, "extra_fields"),
        ({"filter": {"teacher_score_keep": 1.5}}, "filter.teacher_score_keep"),
        ({"filter": "best"}, "filter"),
        ({"shufle": True}, "shufle"),
        ({"special_tokens": True}, "special_tokens"),
        ({"date": "31.01.2026"}, "date"),
        ({"date": "2026-02-30"}, "date"),
        ({"date": "20260131"}, "date"),
        ({"date": 20260131}, "date"),
        ({"date": datetime(2026, 1, 31, 12)}, "date"),
    ],
)
def test_wrong_values_name_their_field(change, field):
    with pytest.raises(ValidationError) as error:
        DataConfig.model_validate({**REQUIRED, **change})
    assert first_problem(error.value).startswith(f"{field} is ")


@pytest.mark.parametrize("value", ["2026-01-31", date(2026, 1, 31)])  # YAML without quotes gives the second
def test_date(value):
    cfg = DataConfig.model_validate({**REQUIRED, "date": value})
    assert cfg.date == "2026-01-31" and cfg.text_options.date == "2026-01-31"
    assert DataConfig.model_validate({**REQUIRED, "date": "none"}).date is None


def test_required():
    with pytest.raises(ValidationError, match="max_length"):
        DataConfig.model_validate({"tokens_per_micro_batch": 4})
