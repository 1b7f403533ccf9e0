"""Rewards: the built-in ones by hand, and what is refused."""

import re

import pytest

from megalign.rollout.rewards import choose_reward
from megalign.schema import UserError

SUM = {"answer": "42", "metadata": {"source_dataset": "chain_sum"}}


@pytest.mark.parametrize(
    ("name", "response", "record", "wanted"),
    [
        ("exact_match", " 42\n", {"answer": "42 "}, 1.0),
        ("exact_match", "42.", {"answer": "42"}, 0.0),
        ("final_number", "so 6 x 7 = 42.", {"answer": "6 * 7\n#### 42"}, 1.0),
        ("final_number", "It costs $1,042.50", {"answer": "#### 1042.5"}, 1.0),
        ("final_number", "-42", {"answer": "42"}, 0.0),
        ("final_number", "42 or 43", {"answer": "42"}, 0.0),
        ("final_number", "no idea", {"answer": "42"}, 0.0),
        ("reasoning_gym", " 42", SUM, 1.0),
        ("reasoning_gym", "41", SUM, 0.0),
        (
            "reasoning_gym",
            "142",
            SUM,
            2 / 3,
        ),  # the environment's own partial credit: wanted in found, 2 of 3 characters
        ("reasoning_gym", "", SUM, 0.0),
    ],
)
def test_builtin(name, response, record, wanted):
    assert choose_reward(name)("6 x 7 = ", response, record, "here") == pytest.approx(wanted)


def test_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "limit = 3\n"
        "def length(prompt, response, record):\n    return len(prompt) + len(response) + record['extra']\n"
        "def broken(prompt, response, record):\n    return float('nan')\n"
        "def nothing(prompt, response, record):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    value = choose_reward("my_rewards:length")("ab", "cde", {"extra": 10}, "here")
    assert value == 15.0 and isinstance(value, float)
    for function, shown in (("broken", "nan"), ("nothing", "None")):
        with pytest.raises(UserError, match=f"^p.jsonl:7: reward 'my_rewards:{function}' returned {shown}; a finite"):
            choose_reward(f"my_rewards:{function}")("", "", {}, "p.jsonl:7")
    with pytest.raises(UserError, match="rollout.reward is 'my_rewards:limit': 'limit' is not a function"):
        choose_reward("my_rewards:limit")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact", "rollout.reward is 'exact'; known: exact_match, final_number, reasoning_gym, or module:function"),
        ("no_such_module_here:f", "module 'no_such_module_here' cannot be imported"),
        (":f", "module '' cannot be imported"),
        ("math:no_such", "module 'math' has no 'no_such'"),
    ],
)
def test_unknown_reward(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_reward(spec)


def test_records_are_checked_before_anything_is_sampled():
    with pytest.raises(UserError, match="^p.jsonl:3: answer is 42; reward 'exact_match' needs a string there"):
        choose_reward("exact_match").check_record({"answer": 42}, "p.jsonl:3")
    with pytest.raises(UserError, match="^p.jsonl:3: metadata.source_dataset is None; "):
        choose_reward("reasoning_gym").check_record({"answer": "42", "metadata": "x"}, "p.jsonl:3")


def test_unknown_environment_names_the_record():
    record = {"answer": "42", "metadata": {"source_dataset": "no_such"}}
    with pytest.raises(UserError, match="^p.jsonl:3: metadata.source_dataset is 'no_such': .* no such environment"):
        choose_reward("reasoning_gym")("", "42", record, "p.jsonl:3")
