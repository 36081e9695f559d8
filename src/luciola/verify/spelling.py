"""One spelling for answers that differ only in how LaTeX and people write them. Values are never changed here."""

import re
from functools import lru_cache

MAX_ANSWER = 1000  # characters; the longest reference answer of MATH has some 130

_LAYOUT = [  # (pattern, what stands for it), applied in this order
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"(?<!\\)~"), " "),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\s*\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))"), ","),  # LaTeX's thousands separators
    (re.compile(r"\\(?:left|right|middle|displaystyle)(?![a-zA-Z])|\\[!,:; ]|\\[()\[\]]"), " "),
    (re.compile(r"([$£€]\s?[0-9.,]+)\s([KMBT])(?![a-zA-Z]|\s?\$)"), r"\1\2"),  # thousands, not kelvins
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"μ(?=[a-zA-Z])"), "µ"),
    (re.compile(r"\\mu\s?\\(?:text|mathrm)\s?\{(?=[a-zA-Z]+\})"), r"\\text{µ"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=[0-9])\s?\\frac\s?\{\s?([a-zA-Z]+)\s?\}\{\s?([a-zA-Z]+)\s?\}$"), r" \1/\2"),  # metres/second
    (re.compile(r"\\%"), "%"),
    (re.compile(r"<=|≤|\\(?:leq(?:q|slant)?|le)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r">=|≥|\\(?:geq(?:q|slant)?|ge)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\mathbb\s?(?:\{\s?R\s?\}|R(?![a-zA-Z]))|\\R(?![a-zA-Z])|ℝ"), r"\\mathbb{R}"),
    (re.compile(r"\\(?:varnothing|emptyset)(?![a-zA-Z])|∅|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\Omega(?![a-zA-Z])"), "Ω"),
    (re.compile(r"\\mid(?![a-zA-Z])"), "|"),
]
_SIGNS = [
    (re.compile(r"(?<![a-zA-Z])(?:USD|EUR|GBP|US(?=\\?\$))(?![a-zA-Z])|\\?\$|[£€]"), " "),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?|°"), " "),
]
_BLANKS = [
    (re.compile(r"\s*\n\s*"), "\n"),
    (re.compile(r"[^\S\n]+"), " "),
    # Blanks count between two words or numbers ("1 2" is not 12), before ".5", and where "1, 200" would become "1,200".
    (re.compile(r"(?<![\w.,]) |(?<=,) (?![0-9]{3})| (?!\w|\.[0-9])"), ""),
    (re.compile(r"[.。]$"), ""),
]


@lru_cache(maxsize=4096)  # a group of completions shares its reference, which is looked at several times for each
def canonical(text: str) -> str:
    """One spelling for what differs only in LaTeX's spacing, fraction commands, currency and degree signs and so on."""
    return _applied(_SIGNS + _BLANKS, laid_out(text))


@lru_cache(maxsize=4096)
def laid_out(text: str) -> str:
    """`canonical` short of the signs that stand for units, and of blanks: `$5` and `90^\\circ` keep theirs."""
    return _applied(_LAYOUT, text.strip())


def _applied(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    if len(text) <= MAX_ANSWER:
        for pattern, replacement in rules:
            text = pattern.sub(replacement, text)
    return text.strip()
