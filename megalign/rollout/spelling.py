"""Rewrites the many spellings of numbers and LaTeX into a single one, so that answers can be parsed."""

from __future__ import annotations

import re
import unicodedata

IDEOGRAM = "[\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af]"  # Chinese, Japanese, Korean
SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
# (pattern, replacement) from LaTeX and Markdown to plain text; order matters.
PLAINER = (
    (r"\\(?:left|right|displaystyle|,|!|;|:)", ""),
    (r"\{,\}", ","),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf)\s?\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)\\[dt]?frac\s?\{\s?(\d+)\s?\}\s?\{\s?(\d+)\s?\}", r" \1/\2"),
    (r"\\[dt]?frac\s?\{\s?(-?\d+)\s?\}\s?\{\s?(\d+)\s?\}", r"\1/\2"),
    (r"(?<=\d)\\[dt]?frac\s?(\d)\s?(\d)", r" \1/\2"),
    (r"\\[dt]?frac\s?(\d)\s?(\d)", r"\1/\2"),
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (r"\\pm(?![a-zA-Z])", "+-"),
    (r"\\infty", "\u221e"),
    (r"\\?\^\s?\{?\s?\\circ\s?\}?|\\degree|\u00b0", " "),
    (r"\\ |\\quad|~", " "),
    (r"\\([%{}#&_])", r"\1"),
    (r"(?:\b(?:US|HK|NZ|A|C))?\\?[$\u20ac\u00a3\u00a5\u20b9\u00a2]|\b[A-Z]{3}(?=\d)", ""),
    (r"\\[()\[\]]", ""),
    (r"`|(?<![\w}\\])_+(?=[-+]?\d)|(?<=\d)_+(?!\w)", ""),  # code and emphasis of Markdown
    (r"(?<=\d)_(?=\d{3}(?!\d))", ""),
    (r"(?<=\d)\u2019(?=\d{3}(?!\d))", "'"),
    (r"(?m)^\s*(?:[=-]?>|#+)\s*(?=[-+\d])|[\u200b\ufeff\u2192\u21d2\u2234\u2713\u2714\u2705]", ""),
    (r"<([-+\d.,/]+)>", r"\1"),
    (rf"(?<={IDEOGRAM})(?=[-+]?\d)|(?<=\d)(?={IDEOGRAM})", " "),  # written without blanks
    (r"(?<=[\d%])\s*(?:,?\s(?:and|or)|[,;](?=\s?[a-zA-Z]\s?=))\s+(?:[a-zA-Z]\s?=\s?)?(?=[-+]?\.?\d)", "; "),  # lists
)


def plainer(text: str) -> str:
    """Normalise minus signs, digits, fractions, powers and blanks to one spelling, and drop currencies."""
    text = re.sub(r"(?<=[\d)])([\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+)", _power, text)
    text = re.sub(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]", "", text)
    text = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u3002", ".")
    text = re.sub(r"[\u2212\u2010-\u2013]", "-", text)
    text = re.sub(r"[\u00d7\u00b7\u22c5]", "*", text).replace("\u00f7", "/").replace("\u00b1", "+-")
    for pattern, plain in PLAINER:
        text = re.sub(pattern, plain, text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _power(match: re.Match[str]) -> str:
    return "^" + match[1].translate(SUPERSCRIPTS)
