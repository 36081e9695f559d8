"""Compare answers that need no algebra: numbers, words, and lists of the wrong length. Fast, exact, in this process.

Numbers are compared exactly, as fractions: a rounded decimal is not the fraction it came from, and there is no
tolerance under which a tiny answer could pass for zero. Where the reference is a number, the answer must be one too:
`6+9` is the question and not the answer when 15 is asked for.
"""

import re
from fractions import Fraction

from luciola.verify.units import unit_of
from luciola.verify.verdict import Verdict, correct, wrong

MAX_ANSWER = 1000  # characters; the longest reference answer of MATH has some 130

_SPELLINGS = [  # (pattern, what stands for it), applied in this order
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"(?<![a-zA-Z])(?:USD|EUR|GBP|US(?=\\?\$))(?![a-zA-Z])"), " "),
    (re.compile(r"(?<=[0-9])(?:\{,\}|,\s*\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))"), ","),  # LaTeX's thousands separators
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,:; ]|\\?\$|[£€]|\\[()\[\]]"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?|°"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\s*\n\s*"), "\n"),
    (re.compile(r"[^\S\n]+"), " "),
    # Blanks count between two words or numbers ("1 2" is not 12), before ".5", and where "1, 200" would become "1,200".
    (re.compile(r"(?<![\w.,]) |(?<=,) (?![0-9]{3})| (?!\w|\.[0-9])"), ""),
    (re.compile(r"[.。]$"), ""),
]
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)(?: (?=[0-9]+/)|(?=\\frac)))?"
    rf"(?:(?P<above>{_DECIMAL})/(?P<below>{_DECIMAL})"
    rf"|\\frac ?(?:\{{(?P<up>[+-]?{_DECIMAL})\}}|(?P<up_digit>[0-9]))"
    rf" ?(?:\{{(?P<low>[+-]?{_DECIMAL})\}}|(?P<low_digit>[0-9]))"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:[eE]|(?:\*|×|\\times|\\cdot) ?10\^)\{{?(?P<exponent>[+-]?[0-9]{{1,3}})\}}?)?)"
)
_NAME = re.compile(r"^[a-zA-Z](?:_\w|\(\w\))?(?:=|\\in ?(?![a-z]))")
_ONE_UNIT = r"(?:[a-zA-Z]{2,}|[mgshlL])"
_UNIT = re.compile(rf"%| {_ONE_UNIT}(?: [a-zA-Z]{{2,}})?(?:\^\{{?[23]\}}?)?(?:(?:/| per ){_ONE_UNIT}(?:\^\{{?2\}}?)?)?")
_BRACKETED = re.compile(r"([\[(])([^()\[\]]*)([\])])")
_COMMA = re.compile(r"(?<![0-9]),|,(?![0-9]{3}(?![0-9]))")  # not one that separates thousands
_INFINITY = re.compile(r"([+-]?)(?:\\infty|∞)")
_NOT_UNITS = re.compile(
    r"\b(?:or|and|to|not|mod|modulo|minus|plus|times|over|divided|by|point|pi|squared|cubed|factorial|half|halves|thirds?|"
    r"quarters?|tenths?|hundred|hundredths|thousand|thousandths|million|billion|trillion|dozen|score)\b",
    re.IGNORECASE,
)
_CALCULATION = re.compile(r"[0-9)}] ?(?:[-+*/×÷!]|\\times|\\cdot|\\div|\\pm)")
_INEQUALITY = re.compile(r"[<>]|\\[lg](?:e|eq|t)(?![a-z])")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{[^{},]+\}\.?|\(?[A-Za-z]\)?|[Nn]o|[A-Za-z][A-Za-z' -]*[A-Za-z]{2}")
_SEPARATOR = re.compile(r"[,;\n]|\\\\|\\q?quad(?![a-zA-Z])|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|(?<=[0-9]) (?=[0-9])")


def canonical(text: str) -> str:
    """One spelling for what differs only in LaTeX's spacing, fraction commands, currency and degree signs and so on."""
    text = text.strip()
    if len(text) <= MAX_ANSWER:
        for pattern, replacement in _SPELLINGS:
            text = pattern.sub(replacement, text)
    return text.strip()


def number(text: str) -> Fraction | None:
    """The exact value of a number as people and LaTeX write it, or None for anything else.

    Integers, decimals, fractions (`3/4`, `\\frac34`), mixed numbers (`1 1/2`), thousands separators (`1,000`, not
    `1,00`), scientific notation with an exponent below 1000; each perhaps behind `x =` and before a percent sign or a
    unit, of which `units.py` has more. Only the digits 0 to 9: neither `٣` nor `4²` nor `½` is read.
    """
    text = _NAME.sub("", canonical(text))
    match = _NUMBER.match(text) if len(text) <= MAX_ANSWER else None
    if match is None or not _is_unit(text[match.end() :]):
        return None
    part = {name: digits.replace(",", "") for name, digits in match.groupdict().items() if digits}
    if "decimal" in part:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part.get("exponent", 0))
    else:
        above = Fraction(part.get("above") or part.get("up") or part["up_digit"])
        below = Fraction(part.get("below") or part.get("low") or part["low_digit"])
        if below == 0:
            return None
        value = Fraction(part.get("whole", 0)) + above / below
    return -value if part.get("sign") == "-" else value


def compare(answer: str, truth: str) -> Verdict | None:
    """The verdict where it needs no algebra, else None.

    Raises:
        ValueError: when `truth` is blank, since nothing could be right.
    """
    given, asked = canonical(answer), canonical(truth)
    if not asked:
        raise ValueError(
            "The reference answer is empty, so no completion could be right; give a truth to compare with."
        )
    if given == asked:
        return correct()
    if len(answer) > MAX_ANSWER:
        return wrong(f"the answer is longer than {MAX_ANSWER} characters")
    if any(character.isnumeric() and not character.isascii() for character in given):
        return wrong("the answer has digits other than 0 to 9")
    value = number(truth)
    if value is not None:
        answered = number(answer)
        if answered is not None:
            return wrong() if answered != value else _unless_units_differ(given, asked) or correct()
        if _CALCULATION.search(given) or _NOT_UNITS.search(given):
            return wrong("the answer is a calculation where a number is asked for")
    if (ends := _bracketed(asked)) is not None and (answered_ends := _bracketed(given)) is not None:
        return correct() if answered_ends == ends else wrong()
    if _WORDS.fullmatch(truth.strip()):
        return correct() if _fold(given) == _fold(asked) else wrong()
    if _count(given) != _count(asked) and not _INEQUALITY.search(given):  # -2 < x < 7 has the two ends of an interval
        return wrong(f"the answer lists {_count(given)} values where {_count(asked)} are asked for")
    return _unless_units_differ(given, asked)


def _unless_units_differ(given: str, asked: str) -> Verdict | None:
    unit, due = unit_of(given), unit_of(asked)
    return wrong(f"the unit is {unit} where {due} is asked for") if unit and due and unit != due else None


def _bracketed(text: str) -> tuple[object, ...] | None:
    """An interval, or a list in brackets, whose parts are numbers or infinite: its brackets and their exact values."""
    match = _BRACKETED.fullmatch(text)
    if match is None or len(parts := _COMMA.split(match[2])) < 2 or "=" in text:
        return None
    values: list[object] = []
    for part in parts:
        infinite = _INFINITY.fullmatch(part.strip())
        value = f"{infinite[1] or '+'}infinity" if infinite else number(part)
        if value is None:
            return None
        values.append(value)
    return (match[1], *values, match[3])


def _is_unit(rest: str) -> bool:
    unit = _UNIT.fullmatch(rest)
    return not rest or (unit is not None and not _NOT_UNITS.search(rest))


def _fold(words: str) -> str:
    return words.strip("() .").casefold()


def _count(text: str) -> int:
    """How many values a canonical text lists: separators outside inner brackets, and both signs of a plus-minus."""
    if "\\begin" in text:  # a matrix is one value
        return 1
    text = _NAME.sub("", text.replace("\\{", "{").replace("\\}", "}"))
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    depths: list[int] = []
    for character in text:
        depths.append((depths[-1] if depths else 0) + (character in "([{") - (character in ")]}"))
    bracketed = text[:1] in ("(", "[", "{") and 0 not in depths[:-1] and depths[-1] == 0
    outer = "".join(character for character, depth in zip(text, depths, strict=True) if depth == int(bracketed))
    return (1 + len(_SEPARATOR.findall(outer))) * (2 if "\\pm" in text else 1)
