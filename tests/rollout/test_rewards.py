"""Rewards: the built-in ones by hand, and what is refused."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from megalign.rollout.guard import TimeIsUp, time_limit
from megalign.rollout.rewards import Reward, RewardCall, choose_reward
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
    (tmp_path / "length_rewards.py").write_text(
        "limit = 3\n"
        "def length(prompt, response, record):\n    return len(prompt) + len(response) + record['extra']\n"
        "def broken(prompt, response, record):\n    return float('nan')\n"
        "def nothing(prompt, response, record):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    value = choose_reward("length_rewards:length")("ab", "cde", {"extra": 10}, "here")
    assert value == 15.0 and isinstance(value, float)
    for function, shown in (("broken", "nan"), ("nothing", "None")):
        with pytest.raises(
            UserError, match=f"^p.jsonl:7: reward 'length_rewards:{function}' returned {shown}; must be a finite"
        ):
            choose_reward(f"length_rewards:{function}")("", "", {}, "p.jsonl:7")
    with pytest.raises(UserError, match="rollout.reward is 'length_rewards:limit': 'limit' must be a function"):
        choose_reward("length_rewards:limit")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact", "rollout.reward is 'exact'; must be exact_match, final_number, reasoning_gym or module:function"),
        ("no_such_module_here:f", "module 'no_such_module_here' cannot be imported"),
        (":f", "rollout.reward is ':f': must be module:function"),
        ("math:no_such", "module 'math' has no 'no_such'"),
    ],
)
def test_unknown_reward(spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_reward(spec)


def test_records_are_checked_before_anything_is_sampled():
    with pytest.raises(
        UserError, match="^p.jsonl:3: answer is 42; must be a string, which reward 'exact_match' needs there"
    ):
        choose_reward("exact_match").check_record({"answer": 42}, "p.jsonl:3")
    with pytest.raises(UserError, match="^p.jsonl:3: metadata.source_dataset is None; "):
        choose_reward("reasoning_gym").check_record({"answer": "42", "metadata": "x"}, "p.jsonl:3")


def test_unknown_environment_names_the_record():
    record = {"answer": "42", "metadata": {"source_dataset": "no_such"}}
    with pytest.raises(UserError, match="^p.jsonl:3: metadata.source_dataset is 'no_such': .* no such environment"):
        choose_reward("reasoning_gym")("", "42", record, "p.jsonl:3")


MISBEHAVING = """
import decimal as decimal_module
import re, sys, time, numpy, torch

def raises(prompt, response, record):
    return record["nothing"]

def leaves(prompt, response, record):
    sys.exit("bye")

def interrupts(prompt, response, record):
    raise KeyboardInterrupt

class Odd(BaseException):
    def __str__(self):
        raise ValueError("not even this")

def odd(prompt, response, record):
    raise Odd

def deep(prompt, response, record):
    return deep(prompt, response, record)

def sleeps(prompt, response, record):
    time.sleep(60)

def spins(prompt, response, record):
    while True:
        pass

def matches(prompt, response, record):
    return float(bool(re.fullmatch("(a+)+b", "a" * 40)))

def multiplies(prompt, response, record):
    return float(len(str(7 ** (10 ** 9))) > 0)

def swallows(prompt, response, record):
    try:
        time.sleep(60)
    except BaseException:
        return 1.0

def words(prompt, response, record):
    return "1.0"

def several(prompt, response, record):
    return numpy.ones(2)

async def waits(prompt, response, record):
    return 1.0

def decimal(prompt, response, record):
    return decimal_module.Decimal("0.5")

def huge(prompt, response, record):
    return 10 ** 400

def array(prompt, response, record):
    return numpy.float32(0.5) if response else numpy.array([0.5])

def tensor(prompt, response, record):
    return torch.tensor(0.5, dtype=torch.bfloat16)

def truth(prompt, response, record):
    return numpy.bool_(True)

def changes(prompt, response, record):
    record["seen"].append(1)
    return len(record["seen"])
"""


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield lambda name: choose_reward(f"misbehaving:{name}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", r"raised KeyError: 'nothing' \(misbehaving.py line 6\)"),
        ("leaves", r"raised SystemExit: bye \(misbehaving.py line 9\)"),
        ("interrupts", r"raised KeyboardInterrupt \(misbehaving.py line 12\)"),
        ("odd", r"raised Odd: \(its message cannot be read\)"),
        ("deep", "raised RecursionError: maximum recursion depth exceeded"),
        ("sleeps", "did not return in 0.2 s"),
        ("spins", "did not return in 0.2 s"),
        ("matches", "did not return in 0.2 s"),
        ("multiplies", "did not return in 0.2 s"),
        ("swallows", "did not return in 0.2 s"),
        ("words", "returned '1.0'"),
        ("several", r"returned array\(\[1., 1.\]\)"),
        ("waits", "returned <coroutine object waits"),
        ("huge", "returned 1000000"),
    ],
)
def test_whatever_a_reward_does_names_record_and_reward(name, told, misbehaving):
    wanted = f"^p.jsonl:7: reward 'misbehaving:{name}' {told}.*; must be a finite number$"
    with pytest.raises(UserError, match=wanted):
        misbehaving(name)("", "", {}, "p.jsonl:7", limit_s=0.2)


def test_numbers_of_other_libraries_are_numbers(misbehaving):
    for name, response, wanted in (
        ("array", "x", 0.5),
        ("array", "", 0.5),
        ("tensor", "", 0.5),
        ("truth", "", 1.0),
        ("decimal", "", 0.5),
    ):
        value = misbehaving(name)("", response, {}, "here")
        assert value == wanted and type(value) is float


def test_no_call_sees_what_an_earlier_one_changed(misbehaving):
    record = {"seen": []}
    assert [misbehaving("changes")("", "", record, "here") for _ in range(2)] == [1.0, 1.0] and record == {"seen": []}


def test_a_time_limit_inside_another_leaves_the_outer_one_running():
    began = time.monotonic()
    with pytest.raises(TimeIsUp), time_limit(0.4):
        with pytest.raises(TimeIsUp), time_limit(0.1):
            time.sleep(5)
        assert 0.1 <= time.monotonic() - began < 0.4
        time.sleep(5)
    assert 0.4 <= time.monotonic() - began < 4
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_builtin_that_never_returns_ends_the_process():
    """No signal is handled inside one, so nothing but the stack can be told, and the job must not wait for ever."""
    script = (
        "import itertools; from megalign.rollout import guard; guard.PATIENCE_S = 0.5\n"
        "def endless(): return sum(itertools.repeat(0))\n"
        "guard.call(endless, limit_s=0.2)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("Timeout") and "in endless" in done.stderr


def test_ctrl_c_is_not_an_error_of_the_reward():
    def waits(prompt, response, record):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            Reward("waits", waits)("", "", {}, "here")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys; sys.exit(3)", "it raised SystemExit: 3"),
        ("1 / 0", "it raised ZeroDivisionError: division by zero"),
        ("def f(:", "it raised SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_fails_at_import(text, told, tmp_path, monkeypatch):
    name = f"fails_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"rollout.reward is '{name}:f': module '{name}' cannot be imported: {told}"):
        choose_reward(f"{name}:f")


BATCHED = """
from megalign.rollout.rewards import RewardCall, batched

seen = []

@batched
def lengths(calls):
    seen.append(len(calls))
    for call in calls:
        call.record["extra"] += 100  # of a copy
    return [len(call.prompt) + len(call.response) + call.record["extra"] - 100 for call in calls]

@batched
def one_bad(calls):
    return [1.0, float("nan"), 2.0]

@batched
def short(calls):
    return [1.0]

@batched
def number(calls):
    return 1.0

@batched
def raises(calls):
    raise KeyError(calls[0].where)

@batched
def sleeps(calls):
    import time
    time.sleep(20)
"""


def test_batched_functions_get_all_responses_at_once(tmp_path, monkeypatch):
    (tmp_path / "batched_rewards.py").write_text(BATCHED)
    monkeypatch.syspath_prepend(tmp_path)
    calls = [RewardCall("ab", "c" * number, {"extra": 10}, f"p.jsonl:{number + 1}") for number in range(3)]
    lengths = choose_reward("batched_rewards:lengths")
    assert lengths.score(calls) == [12.0, 13.0, 14.0] and lengths.score([]) == []
    assert lengths("ab", "", {"extra": 10}, "p.jsonl:1") == 12.0
    import batched_rewards

    assert batched_rewards.seen == [3, 1]
    for name, told in (
        ("one_bad", "p.jsonl:2: reward 'batched_rewards:one_bad' returned nan; must be a finite number"),
        ("short", r"p.jsonl:1 to p.jsonl:3: reward 'batched_rewards:short' returned \[1.0\] for 3 responses; must"),
        ("number", "p.jsonl:1 to p.jsonl:3: reward 'batched_rewards:number' returned 1.0 for 3 responses; must"),
        ("raises", r"p.jsonl:1 to p.jsonl:3: reward 'batched_rewards:raises' raised KeyError: 'p.jsonl:1' \(batched"),
        ("sleeps", "p.jsonl:1 to p.jsonl:3: reward 'batched_rewards:sleeps' did not return in 0.2 s"),
    ):
        with pytest.raises(UserError, match=f"^{told}"):
            choose_reward(f"batched_rewards:{name}").score(calls, limit_s=0.2)


def test_a_reward_of_single_responses_scores_a_list_too():
    calls = [RewardCall("", response, {"answer": "7"}, "here") for response in ("7", "8", " 7 ")]
    assert choose_reward("exact_match").score(calls) == [1.0, 0.0, 1.0]
