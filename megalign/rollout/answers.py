r"""Finds the final answer in a free text and tells whether two answers are equal.

The answer is the content of the last `\boxed{}`, else what follows the last `####`, else the whole text if it has no
words, else the last number, fraction, list or formula of the text. Numbers and lists of numbers are compared here, as
exact fractions; all other mathematics (roots, polynomials, sets, intervals) by math-verify.

math-verify alone is not enough: of 43 forms that people write every day, math-verify 0.9 misjudges 9, such as
`1.5e3` = 1500, `1 1/2` = 1.5, a Unicode minus sign and the list `[1, 2]`. Its own time limits, too, work only in the
main thread.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from megalign.rollout.guard import TimeIsUp, time_limit
from megalign.rollout.spelling import plainer

LONGEST = 200  # characters of an answer
LONGEST_WORDS = 40  # characters of an answer of words
TAIL = 800  # characters at a text's end that are searched for an unmarked answer
LARGEST_EXPONENT = 400  # of ten
COMPARE_S = 5.0  # for one comparison by math-verify, in the main thread; sizes are bounded in every thread
ROUNDED = Fraction(2, 1_000_000)  # relative error up to which a decimal equals a fraction without exact decimal

DIGITS = r"(?:(?<!\d)\d{1,3}(?:[,' ]\d{3})+(?![\d])(?!,\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
PERCENT = r"\s?(?:%|percent\b|per cent\b)"
NUMBER = rf"[-+]?{DIGITS}"
FORMS = {
    "number": re.compile(rf"(?P<a>{NUMBER})"),
    "fraction": re.compile(rf"(?P<a>{NUMBER})\s?/\s?(?P<b>{DIGITS})"),
    "mixed": re.compile(r"(?P<w>[-+]?\d+)\s(?P<a>\d+)/(?P<b>\d+)"),
    "scientific": re.compile(rf"(?P<a>{NUMBER})\s?[x*]\s?10\s?(?:\^|\*\*)\s?[({{]?(?P<e>[-+]?\d+)[)}}]?"),
}
# Ranges, dates, times, ratios, versions, tolerances: neither a single number nor a list.
JOINED = re.compile(rf"{DIGITS}(?:[-:]{DIGITS})+|\d+(?:/\d+){{2,}}|\d+(?:\.\d+){{2,}}|{NUMBER}\s?\+-\s?{DIGITS}")
TOKEN = re.compile(
    r"(?P<word>(?![xX](?=\s?\d))[^\W\d_]\w*(?:\^[({]?-?\d+[)}]?)?)"  # the digits of CO2 and m^2 are not answers
    rf"|(?P<latex>\\[a-zA-Z]+)|(?P<number>{DIGITS})|(?P<sign>[-+*/^x%,;:()\[\]{{}}|\u221e])|(?P<gap> )|(?P<other>.|\n)"
)
OPENING, CLOSING = "([{", ")]}"
# Matches text that ends where the answer begins.
VARIABLE = r"(?<![<>!])=|\\approx|\u2248|\\in(?![a-zA-Z])|\u2208|^\([A-Za-z]\)(?=.*\d)|^[A-Za-z][:)]\s"  # x =, (B), A:
UNTAMED = re.compile(r"\d{31}|(?:\^|\*\*)\s?[({]?\s?[-+]?\d{4}|\^[^\s+*/-]*\^|\*\*.*\*\*|\d{3}!|\\(?:int|sum|prod|lim)")


@dataclass(frozen=True, slots=True)
class Answer:
    """Holds one answer: a number, a list of numbers with its brackets, words, or other mathematics as text."""

    text: str
    number: Fraction | None = None
    percent: bool = False
    members: tuple[Fraction | str, ...] = ()  # infinities as text
    brackets: str = ""
    words: bool = False  # such as yes, or a name


def equal_answers(given: str, wanted: str) -> bool:
    """Tell whether the final answers of two texts are equal; False where one of them has none."""
    left, right = final_answer(given), final_answer(wanted)
    if left is None or right is None:
        return False
    if left.number is not None and right.number is not None:
        return _equal_numbers(left, right)
    if left.members and right.members:
        return _equal_lists(left, right)
    if left.text == right.text or left.words or right.words:
        return left.text == right.text
    if left.members or right.members:
        # A list never equals a number; sets and intervals in other forms are compared as mathematics.
        return (left.number is None and right.number is None) and _equal_mathematics(left, right)
    return not (_is_joined(left) or _is_joined(right)) and _equal_mathematics(left, right)


def final_answer(text: str) -> Answer | None:
    """Return the final answer of a text, or None."""
    boxed = _last_boxed(text)
    if boxed is None and "####" in text:
        boxed = text[text.rindex("####") + 4 :].strip().partition("\n")[0]
    if boxed is not None:
        return read(plainer(boxed)) or _last_in(plainer(boxed)) or _words(plainer(boxed))
    tail = text if len(text) <= TAIL else text[-TAIL:].partition(" ")[2]
    formula = _last_formula(tail)
    plain = plainer(tail if formula is None else formula)
    if formula is not None or not _has_words(plain):
        whole = read(plain)
        if whole is not None:
            return whole
    return _last_in(plain) or _words(plain)


def read(text: str) -> Answer | None:
    """Parse the whole text as one answer, after dropping a leading `x =` and a unit at its end; None for words."""
    text = text.strip().strip("*").rstrip(".,;:!?").strip()
    text = re.sub(r"^-\s+(?=[\d.])", "-", re.split(VARIABLE, text)[-1].strip())
    if not text or len(text) > LONGEST or "\n" in text:
        return None
    for candidate in (text, _without_unit(text)):
        answer = _number(candidate) or _list(candidate)
        if answer is not None:
            return answer
    if _has_words(text):
        return None
    return Answer("".join(text.split()))


def _words(text: str) -> Answer | None:
    """Parse a short line of words without digits as an answer, in lower case; else None."""
    text = text.strip(" *.,;:!?\"'()").casefold()
    if not _has_words(text) or len(text) > LONGEST_WORDS or re.search(r"[\d\n\\]", text):
        return None
    return Answer(text, words=True)


def _has_words(text: str) -> bool:
    """Tell whether the text has a word of two letters or more; variables have one."""
    return any(sum(map(str.isalpha, token[0])) > 1 for token in TOKEN.finditer(text) if token["word"])


def _without_unit(text: str) -> str:
    """Drop a unit or noun behind a number, such as km/h, m^2 or apples; not x, y, z or n, nor the e of 1e9."""
    match = re.search(r"(?<=[\d)])\s?(?![xyzn]$|[eE][-+]?\d)/?[^\W\d_][\w./^() -]*$", text)
    if match is None or re.search(r"[^\w^(-]\d", match[0]):
        return text
    return text[: match.start()]


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` if its brace is closed."""
    start = text.rfind("\\boxed")
    opened = text.find("{", start) if start >= 0 else -1
    depth = 0
    for index in range(opened, min(len(text), opened + 2 * LONGEST)) if opened >= 0 else ():
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[opened + 1 : index]
    return None


def _last_formula(tail: str) -> str | None:
    r"""Return the content of the last `$...$`, `\(...\)` or `\[...\]` if it holds LaTeX and no number follows it."""
    last = None
    for match in re.finditer(r"\$([^$\n]{1,400})\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", tail, re.DOTALL):
        last = match
    if last is None or re.search(r"\d", tail[last.end() :]):
        return None
    content = next(group for group in last.groups() if group is not None)
    return content if "\\" in plainer(content) else None


def _last_in(text: str) -> Answer | None:
    """Return the last stretch of numbers and signs between words that parses as an answer."""
    for run in reversed(_runs(text)):
        for piece in (run, *reversed(run.split(" "))):
            piece = _trimmed(piece)
            answer = read(piece) if re.search(r"\d", piece) else None
            if answer is not None and (answer.number is not None or answer.members or piece == run or " " not in run):
                return answer
    return None


def _runs(text: str) -> list[str]:
    """Split a text at words, equals signs and ends of sentences; return the stretches between them."""
    runs, run, glued = [], "", False
    for token in TOKEN.finditer(text):
        if token["word"] or token["other"] or (token[0] == ":" and text[token.end() : token.end() + 1] in ("", " ")):
            runs.append(run)
            run, glued = "", bool(token["word"])
        elif glued and not run and token[0] in "-+/^":
            glued = False  # between a word and a number it is not a sign, as in GPT-4
        else:
            run, glued = run + token[0], False
    runs.append(run)
    return [trimmed for run in runs if (trimmed := _trimmed(run))]


def _trimmed(run: str) -> str:
    """Strip signs that belong to no number: bullets, emphasis, commas, unmatched brackets."""
    before = ""
    while run != before:
        before = run
        run = run.strip(" ,;:*/^|x").rstrip("-+").lstrip("%")
        run = re.sub(r"^[-+]+(?=[\s(\[{])", "", run)
        if run and run[0] in CLOSING or (run and run[0] in OPENING and not _closes(run)):
            run = run[1:]
        elif run and run[-1] in OPENING or (run and run[-1] in CLOSING and not _opens(run)):
            run = run[:-1]
    return run


def _closes(run: str) -> bool:
    return any(sign in run for sign in CLOSING)


def _opens(run: str) -> bool:
    return any(sign in run for sign in OPENING)


def _number(text: str) -> Answer | None:
    """Parse a number in one of FORMS, with or without a percent sign; else None."""
    text = text.strip()
    if re.fullmatch(r"\([^()]*\)|\{[^{}]*\}", text):
        text = text[1:-1].strip()
    bare = re.sub(rf"{PERCENT}$", "", text)
    percent = bare != text
    for form in FORMS.values():
        match = form.fullmatch(bare)
        value = None if match is None else _value(match.groupdict())
        if value is not None:
            return Answer(text, value / 100 if percent else value, percent)
    return None


def _value(parts: dict[str, str]) -> Fraction | None:
    """Evaluate a match of FORMS; None where it is absurdly large or divides by zero."""
    top, bottom = _decimal(parts["a"]), _decimal(parts.get("b") or "1")
    power = int(parts.get("e") or "0")
    if top is None or not bottom or abs(power) > LARGEST_EXPONENT:
        return None
    whole = parts.get("w")
    if whole is None:
        return top / bottom * Fraction(10) ** power
    return Fraction(int(whole)) + (-1 if whole.startswith("-") else 1) * top / bottom


def _decimal(text: str) -> Fraction | None:
    digits = re.sub(r"[,' ]", "", text)
    exponent = re.search(r"[eE]([-+]?\d+)$", digits)
    if exponent and abs(int(exponent[1][:9])) > LARGEST_EXPONENT:
        return None
    return Fraction(digits)


def _list(text: str) -> Answer | None:
    """Parse two or more numbers between commas, with or without brackets; else None."""
    brackets = ""
    if text[:1] in ("(", "[", "{") and text[-1:] in (")", "]", "}"):
        brackets, text = text[0] + text[-1], text[1:-1]
    for separator in (r";", r",\s", r"[,;]"):  # the first that yields numbers only, because thousands have commas too
        members = [_member(part) for part in re.split(separator, text)]
        if len(members) > 1 and all(member is not None for member in members):
            numbers = tuple(member for member in members if member is not None)
            if separator == ";" and not brackets and len(set(numbers)) == 1:
                return _number(text.split(";")[0])  # one number in two forms: 3/8, or 37.5%
            return Answer(re.sub(r"\s", "", text).replace(";", ","), members=numbers, brackets=brackets)
    return None


def _member(part: str) -> Fraction | str | None:
    """Parse one element of a list: a number, or an infinity as text; else None."""
    endless = re.fullmatch(r"([-+]?)\s?(?:\u221e|inf(?:inity)?)", part.strip())
    if endless:
        return "-inf" if endless[1] == "-" else "inf"
    answer = _number(part)
    return None if answer is None else answer.number


def _is_joined(answer: Answer) -> bool:
    return JOINED.fullmatch(answer.text) is not None


def _equal_numbers(left: Answer, right: Answer) -> bool:
    """Compare exactly, except that 75% equals 75 too and six digits of a recurring decimal equal its fraction."""
    assert left.number is not None and right.number is not None
    if (
        left.percent != right.percent
        and (left if left.percent else right).number == ((right if left.percent else left).number or Fraction(0)) / 100
    ):
        return True
    if _is_decimal(left.number) != _is_decimal(right.number):
        return abs(left.number - right.number) <= ROUNDED * max(abs(left.number), abs(right.number))
    return left.number == right.number


def _is_decimal(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _equal_lists(left: Answer, right: Answer) -> bool:
    """Compare in order, but sets in any order; brackets must agree where both lists have them."""
    if left.brackets and right.brackets and left.brackets != right.brackets:
        return False
    if "{}" in (left.brackets, right.brackets):
        return set(left.members) == set(right.members)
    return left.members == right.members


def _equal_mathematics(left: Answer, right: Answer) -> bool:
    """Compare by math-verify; False for expressions that are too large or take too long to compare."""
    if any(len(answer.text) > LONGEST or UNTAMED.search(answer.text) for answer in (left, right)):
        return False
    try:
        with time_limit(COMPARE_S):
            given, wanted = (_parsed(answer) for answer in (left, right))
            return bool(given and wanted and _library()[1](wanted, given, timeout_seconds=None))
    except TimeIsUp:
        return False


def _parsed(answer: Answer) -> list[Any]:
    parse, _, latex = _library()
    text = answer.brackets[:1] + answer.text + answer.brackets[1:] if answer.members else answer.text
    expressions = parse(f"${text}$", extraction_config=[latex], parsing_timeout=None, fallback_mode="no_fallback")
    return list(expressions)


@cache
def _library() -> tuple[Any, Any, Any]:
    """Import math-verify: (parse, verify, its LaTeX configuration); our time limit replaces its own."""
    from math_verify import LatexExtractionConfig, parse, verify

    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it would warn that no time limit of its own is on
    return parse, verify, LatexExtractionConfig()
