"""Final answers in the forms people write them, equal and unequal by hand."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megalign.rollout.answers import equal_answers

EQUAL = [
    ("so 6 x 7 = 42.", "6 * 7\n#### 42"),
    ("It costs $1,042.50", "#### 1042.5"),
    ("42", "42"),
    (r"\boxed{42}", "42"),
    (r"The answer is \boxed{\frac{3}{4}}.", "3/4"),
    ("3/4", "0.75"),
    ("75%", "75"),
    ("75%", "0.75"),
    ("75 percent", "75%"),
    ("42 km", "42"),
    ("42 apples", "42 oranges"),
    ("1,000,000", "1000000"),
    ("1 000 000", "#### 1,000,000"),
    ("-3", "-3"),
    ("\u22123", "-3"),
    ("1e3", "1000"),
    ("1.5e-3", "0.0015"),
    (r"$3 \times 10^{4}$", "30000"),
    ("3 x 10^4", "30000"),
    ("3*10^4", "30000"),
    ("3\xd710\u2074", "30000"),
    ("[1, 2]", "[1,2]"),
    (r"x \in [1,2)", "[1, 2)"),
    ("1,2,3", "1, 2, 3"),
    ("{3,1,2}", r"\{1,2,3\}"),
    ("10-12", "10-12"),
    ("10\u201312", "10-12"),
    ("1 1/2", "1.5"),
    ("1\xbd", "3/2"),
    ("\xbd", "0.5"),
    (r"$1\frac{1}{2}$", "1.5"),
    ("**42**", "42"),
    ("x = 5", "5"),
    ("$x=5$", "5"),
    ("#### -5", "-5"),
    ("-$5", "-5"),
    ("the temperature is -5 degrees", "-5"),
    ("1/3", "0.333333"),
    (r"\sqrt{4}", "2"),
    (r"$2\sqrt{3}$", r"\sqrt{12}"),
    (r"\boxed{x+1}", "1+x"),
    (r"\frac12", "0.5"),
    ("5 m^2", "5"),
    ("x^2-1", "-1 + x^2"),
    ("emits 42 kg of CO2", "42"),
    ("USD42", "42"),
    ("1. First 3\n2. 42", "42"),
    ("Answer: 42 (km/h)", "42"),
    (r"$(-\infty, 3]$", r"(-\infty,3]"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{42\text{ cm}}", "42"),
    (r"\boxed{\$42}", "42"),
    (r"\boxed{75\%}", "75"),
    ("It is 90\xb0", "90"),
    ("2^10", "1024"),
    (r"\pi", r"$\pi$"),
    ("The answer is 42, right?", "42"),
    ("Final answer: 3:4", "3:4"),
    ("I got 7th place", "7"),
    ("\uff14\uff12", "42"),
    ("0042", "42"),
    ("42.0", "42"),
    ("+42", "42"),
    (".5", "0.5"),
    ("Her total was 5 - 3 = 2 dollars", "2"),
    ("(42)", "42"),
    ("12 eggs, 3 pans and 5 plates", "5"),
    ("#### 10,000 dollars", "10000"),
]
UNEQUAL = [
    ("-42", "42"),
    ("42 or 43", "42"),
    ("no idea", "42"),
    ("1,2,3", "123"),
    ("1,2,3", "3"),
    ("10-12", "-12"),
    ("10-12", "12"),
    ("10-12", "-2"),
    ("1/4", "3/4"),
    ("1/4", "4"),
    ("[1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("1,2", "12"),
    ("12:30", "30"),
    ("3/4/2020", "2020"),
    ("1.2.3", "3"),
    (r"$2\sqrt{3}$", "3"),
    (r"\boxed{x+1}", "1"),
    ("9**9**9**9", "1"),
    ("$9^{9^{9^{9}}}$", "1"),
    ("1e999999999", "1"),
    ("1/0", "1"),
    ("GPT-4", "-4"),
    ("1.5", "15"),
    ("1,5", "15"),
    ("3.14", "3.14159"),
    ("1000001", "1000000"),
    (r"\sqrt{2}", "2"),
    ("42", "#### "),
    ("", "42"),
    ("1e-9", "2e-9"),
    ("7/8", "8"),
    ("5 to 7", "5"),
    ("5 \xb1 2", "2"),
    ("0.33", "1/3"),
    ("75%", "7.5"),
    ("1/2/3", "1.5"),
    ("1 1/2", "1/2"),
    ("1 1/2", "1 1/3"),
    ("2/4 7", "2"),
]


@pytest.mark.parametrize(("found", "wanted"), EQUAL)
def test_the_same_answer(found, wanted):
    assert equal_answers(found, wanted)


@pytest.mark.parametrize(("found", "wanted"), UNEQUAL)
def test_another_answer(found, wanted):
    assert not equal_answers(found, wanted)


def test_mathematics_is_compared_in_threads_too():
    pairs = [(r"$\sqrt{12}$", r"\boxed{2\sqrt{3}}"), (r"\boxed{(x+1)^2}", "x^2+2x+1"), (r"$[1,2)\cup(3,4]$", "x+1")]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda pair: equal_answers(*pair), pairs)) == [True, True, False]


LONG = [
    "1" * 100_000, "1," * 50_000, "[1," * 30_000, "1 " * 50_000, "(" * 100_000, "$" * 100_000, "\\boxed{" * 20_000,
    "-" * 100_000, "1 000 " * 20_000, "1.1" * 30_000, "\\frac{1}{2}" * 10_000, " " * 100_000 + "x", "a" * 100_000,
    "9^" * 300, "$" + "9^{" * 30 + "9" + "}" * 30 + "$", "$" + "\\sqrt{" * 25 + "2" + "}" * 25 + "$", "$99999999!!$",
]  # fmt: skip


@pytest.mark.parametrize("text", LONG, ids=lambda text: ascii(text[:12]))
def test_any_text_is_read_in_bounded_time(text):
    began = time.process_time()
    assert not equal_answers(text, r"\sqrt{2}+x")
    assert time.process_time() - began < 6
