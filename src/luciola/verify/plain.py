"""Compare answers that need no algebra: numbers, words, and lists of the wrong length. Fast, exact, in this process.

Numbers are compared exactly, as fractions: a rounded decimal is not the fraction it came from, and there is no
tolerance under which a tiny answer could pass for zero. Where the reference is a number, the answer must be one too:
`6+9` is the question and not the answer when 15 is asked for.
"""

import math
import re
from fractions import Fraction

from luciola.verify import units
from luciola.verify.calculation import computes, sides, unreasonable
from luciola.verify.spelling import MAX_ANSWER, canonical
from luciola.verify.verdict import Verdict, correct, wrong

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)(?: (?=[0-9]+/)|(?=\\frac)))?"
    rf"(?:(?P<above>{_DECIMAL})/(?P<below>{_DECIMAL})"
    rf"|\\frac ?(?:\{{(?P<up>[+-]?{_DECIMAL})\}}|(?P<up_digit>[0-9]))"
    rf" ?(?:\{{(?P<low>[+-]?{_DECIMAL})\}}|(?P<low_digit>[0-9]))"
    r"|10\^\{?(?P<ten>[+-]?[0-9]{1,3})\}?"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:[eE]|(?:\*|×|\\times|\\cdot) ?10\^)\{{?(?P<exponent>[+-]?[0-9]{{1,3}})\}}?)?)"
)
_NAME = re.compile(r"^[a-zA-Z](?:_\w|\(\w\))?(?:=|\\in ?(?![a-z]))")
_ONE_UNIT = r"(?:[a-zA-Z]{2,}|[mgshlL])"
_UNIT = re.compile(rf"%| {_ONE_UNIT}(?: [a-zA-Z]{{2,}})?(?:\^\{{?[23]\}}?)?(?:(?:/| per ){_ONE_UNIT}(?:\^\{{?2\}}?)?)?")
_BRACKETED = re.compile(r"(?:(?P<name>[a-zA-Z]) ?\\in ?)?(?P<opens>[\[(])(?P<inner>[^()\[\]]*)(?P<closes>[\])])")
_RELATION = re.compile(r" ?(<|>|\\[lg]e(?![a-z])) ?")
_VARIABLE = re.compile(r"[a-df-hj-zA-Z]")  # e and i are numbers
_COMMA = re.compile(r"(?<![0-9]),|,(?![0-9]{3}(?![0-9]))")  # not one that separates thousands
_INFINITY = re.compile(r"([+-]?)(?:\\infty|∞)")
_NOT_UNITS = re.compile(
    r"\b(?:or|and|to|not|mod|modulo|minus|plus|times|over|divided|by|point|pi|squared|cubed|factorial|half|halves|thirds?|"
    r"quarters?|tenths?|hundred|hundredths|thousand|thousandths|million|billion|trillion|dozen|score)\b",
    re.IGNORECASE,
)
_INEQUALITY = re.compile(r"[<>≤≥]|\\[lg](?:e|eq|eqq|eqslant|t)(?![a-z])")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{[^{},]+\}\.?|\(?[A-Za-z]\)?|[Nn]o|[A-Za-z][A-Za-z' -]*[A-Za-z]{2}")
_AND = r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])"
# A blank between two numbers, but not in `\log_2 3`, `\frac 1 2` and `1 1/2`.
_BLANK = r"(?<=[0-9])(?<!\\log_[0-9])(?<!\\frac[0-9])(?<!\\frac [0-9]) (?=[0-9])(?![0-9]+/[0-9])"
_SEPARATOR = re.compile(rf"[,;\n]|\\\\|\\q?quad(?![a-zA-Z])|{_AND}|{_BLANK}")
_ROOT = re.compile(r" ?([a-zA-Z])(?:_\{?[0-9]\}?)?=")
_CLOCK = re.compile(r"[0-9]{1,2}:0[0-9]")
_BASED = re.compile(
    r"(?:[a-zA-Z]=)?(?P<digits>[+-]?[0-9A-F.,]+)(?:_ ?\{? ?|(?: in)? ?\(?base ?)(?P<base>[0-9]+|[a-z]+) ?[})]?"
)
_BASE = re.compile(r"(?<=[0-9])_ ?\{? ?([0-9]+)")
_WORDS_OF_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {word: str(base) for base, word in enumerate(_WORDS_OF_BASES, start=2)}


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
    if "ten" in part:
        value = Fraction(10) ** int(part["ten"])
    elif "decimal" in part:
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
    if not canonical(truth):
        raise ValueError(
            "The reference answer is empty, so no completion could be right; give a truth to compare with."
        )
    (without, unit), (due_without, due) = units.split(answer), units.split(truth)
    if not units.agree(unit, due):
        return wrong(f"the unit is {units.told(unit)} where {units.told(due)} is asked for")
    given, asked = canonical(without), canonical(due_without)
    if given == asked:
        return correct()
    if len(answer) > MAX_ANSWER:
        return wrong(f"the answer is longer than {MAX_ANSWER} characters")
    if any(character.isnumeric() and not character.isascii() for character in given):
        return wrong("the answer has digits other than 0 to 9")
    if why := unreasonable(given, asked):
        return wrong(why)
    if (verdict := _in_bases(given, asked)) is not None:
        return verdict
    if {"am", "pm"} & {*unit, *due} or _CLOCK.fullmatch(asked):  # to algebra 3:00 would be a ratio
        return correct() if (minutes := _minutes(given)) is not None and minutes == _minutes(asked) else wrong()
    value = number(asked)
    if value is not None:
        stated = [found for side in sides(given) if (found := number(side)) is not None]
        answered = number(given)
        if answered is not None or any(found != value for found in stated):
            return correct() if answered == value else wrong()
        if _NOT_UNITS.search(given):
            return wrong("the answer is a calculation where a number is asked for")
    if (due_ends := _bracketed(asked)) is not None and (ends := _bracketed(given)) is not None:
        same_name = ends[0] == due_ends[0] or not (ends[0] and due_ends[0])
        return correct() if same_name and ends[1:] == due_ends[1:] else wrong()
    if (due_values := _unordered(asked)) is not None and (stated_values := _unordered(given)) is not None:
        return correct() if stated_values == due_values else wrong()
    if _WORDS.fullmatch(truth.strip()):
        return correct() if _fold(given) == _fold(asked) else wrong()
    compares = _INEQUALITY.search(given) or _INEQUALITY.search(asked)  # -2 < x < 7 has the two ends of an interval
    if _count(given) != _count(asked) and not compares:
        return wrong(f"the answer lists {_count(given)} values where {_count(asked)} are asked for")
    if left_to_compute(given, asked) and not (value is not None and "." in asked):  # a surd may be what was rounded
        return wrong("the answer is a calculation where a number is asked for")
    return None


def left_to_compute(given: str, asked: str) -> bool:
    """Whether numbers are asked for, and a value of the answer has still to be computed, as in `\\sqrt{144}`.

    An equation that also states the number, `\\sqrt{144} = 12`, does not. What is irrational cannot be stated
    otherwise, and where the reference is not a number (`2\\sqrt3`, `2^{100}`) there is no one form to ask for.
    """
    if any(number(part) is None and not _INFINITY.fullmatch(part) for part in _parts(_NAME.sub("", asked))):
        return False
    for part in _parts(_NAME.sub("", given)):
        states = len(sides(part)) > 1 and any(number(side) is not None for side in sides(part))
        if not states and any(number(term) is None and computes(term) for term in part.split("\\pm")):
            return True
    return False


def listed(text: str) -> str:
    """Several values with commas between them, of `x = 1 or x = 2` as `1, 2`; any other answer is as it was."""
    parts = _parts(canonical(text))
    if len(parts) < 2 or text.lstrip()[:1] in ("(", "[", "{", "\\") or _INEQUALITY.search(text):
        return text
    names = [_ROOT.match(part) for part in parts]
    if len({name[1] if name else "" for name in names}) == 1 and names[0]:
        parts = [_ROOT.sub("", part, count=1) for part in parts]
    elif not re.search(_AND, text):
        return text
    return ", ".join(parts)


def _in_bases(given: str, asked: str) -> Verdict | None:
    """The verdict on numbers with a base, which algebra would drop: it may be missing, but not be another one."""
    found, due = _BASED.fullmatch(given), _BASED.fullmatch(asked)
    if found is None and due is None:
        bases, due_bases = (sorted(set(_BASE.findall(text))) for text in (given, asked))
        return wrong("the answer is in another base") if bases and due_bases and bases != due_bases else None
    digits, base = _digits(given)
    due_digits, due_base = _digits(asked)
    same = digits == due_digits and (base == due_base or (not digits.isalpha() and not (base and due_base)))
    return correct() if same else wrong()


def _digits(text: str) -> tuple[str, str]:
    found = _BASED.fullmatch(text)
    if found is None:
        return _NAME.sub("", text).replace(",", ""), ""
    return found["digits"].replace(",", ""), _BASES.get(found["base"], found["base"])


def _minutes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,2})(?::([0-5][0-9]))?", text)
    return None if found is None else 60 * int(found[1]) + int(found[2] or 0)


def _bracketed(text: str) -> tuple[object, ...] | None:
    """An interval, or a list in brackets, whose parts are numbers or infinite: its variable, brackets and exact values.

    `2 \\le x < 5` and `x > 3` are intervals of x; of (2, 5] the variable is not told, "".
    """
    match = _BRACKETED.fullmatch(text)
    if match is None:
        return _compared(text)
    if len(parts := _COMMA.split(match["inner"])) < 2 or "=" in text:
        return None
    values = [_end(part) for part in parts]
    return None if None in values else (match["name"] or "", match["opens"], *values, match["closes"])


def _compared(text: str) -> tuple[object, ...] | None:
    """`_bracketed` of a variable between two numbers, or on one side of one."""
    parts: list[str] = _RELATION.split(text)
    if not {"<", "\\le"}.intersection(parts):  # all the other way round
        parts = [{">": "<", "\\ge": "\\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        parts = ["-\\infty", "<", *parts] if _VARIABLE.fullmatch(parts[0]) else [*parts, "<", "\\infty"]
    if len(parts) != 5 or not _VARIABLE.fullmatch(parts[2]) or not {"<", "\\le"}.issuperset(parts[1::2]):
        return None
    low, high = _end(parts[0]), _end(parts[4])
    if low is None or high is None or low >= high:
        return None
    opens = "[" if parts[1] == "\\le" and low != -math.inf else "("
    return parts[2], opens, low, high, "]" if parts[3] == "\\le" and high != math.inf else ")"


def _end(text: str) -> Fraction | float | None:
    infinite = _INFINITY.fullmatch(text.strip())
    return float(f"{infinite[1]}inf") if infinite else number(text)


def _unordered(text: str) -> list[Fraction] | None:
    """The values of a list of numbers in no brackets or in braces, where order has no meaning; sorted."""
    found = [number(part) for part in _parts(_NAME.sub("", listed(text))) if "=" not in part]
    values = [value for value in found if value is not None]
    return sorted(values) if len(values) == _count(text) > 1 and text[:1] not in ("(", "[") else None


def _is_unit(rest: str) -> bool:
    unit = _UNIT.fullmatch(rest)
    return not rest or units.is_unit(rest) or (unit is not None and not _NOT_UNITS.search(rest))


def _fold(words: str) -> str:
    return words.strip("() .").casefold()


def _count(text: str) -> int:
    """How many values a canonical text lists; a plus-minus has both signs."""
    return len(_parts(_NAME.sub("", text))) * (2 if "\\pm" in text else 1)


def _parts(text: str) -> list[str]:
    """The values that a canonical text lists, in brackets or not: what stands between separators outside inner ones."""
    if "\\begin" in text:  # a matrix is one value
        return [text]
    text = text.replace("\\{", "{").replace("\\}", "}")
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    depths: list[int] = []
    for character in text:
        depths.append((depths[-1] if depths else 0) + (character in "([{") - (character in ")]}"))
    if text[:1] in ("(", "[", "{") and 0 not in depths[:-1] and depths[-1] == 0:
        text, depths = text[1:-1], [depth - 1 for depth in depths[1:-1]]
    outer = "".join(character if depth == 0 else "\0" for character, depth in zip(text, depths, strict=True))
    parts, start = [], 0
    for separator in _SEPARATOR.finditer(outer):
        parts.append(text[start : separator.start()].strip())
        start = separator.end()
    return [*parts, text[start:].strip()]
