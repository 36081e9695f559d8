"""Sets of real numbers as they are written, read exactly: intervals, inequalities, their unions, lists in brackets.

`x < -1 \\text{ or } x > 3` is `(-\\infty,-1) \\cup (3,\\infty)`, and so is `\\{x : x < -1 \\text{ or } x > 3\\}`.
What has an end that is no number, such as `\\sqrt2`, is left to algebra, and told to it as intervals.
"""

import math
import re
from fractions import Fraction

from luciola.verify.calculation import VARIABLE
from luciola.verify.exact import number
from luciola.verify.spelling import canonical

End = Fraction | float  # the infinite ones are floats
Interval = tuple[End, str, End, str]  # low, its bracket, high, its bracket
_Condition = tuple[str, str, str, str, str]  # the variable, "" where it is not told, then such an interval as written

_BRACKETED = re.compile(r"([\[(])([^()\[\]]*)([\])])")
_MEMBER = re.compile(rf"({VARIABLE}) ?\\in ?(?=[\[(\\])")
_BUILDER = re.compile(rf"\\\{{({VARIABLE})(?:\\in ?\\mathbb\{{R\}})?(?:\||:)(.*)\\\}}")
_RELATION = re.compile(r" ?(<|>|\\[lg]e(?![a-z])) ?")
_UNKNOWN = re.compile(rf"(?![ei]$){VARIABLE}")  # e and i are numbers
_COMMA = re.compile(r"(?<![0-9]),|,(?![0-9]{3}(?![0-9]))")  # not one that separates thousands
_INFINITY = re.compile(r"([+-]?)(?:\\infty|∞)")
_OR = re.compile(r" ?(?:\\cup|\\l?or|\\vee|(?<![a-zA-Z\\])or)(?![a-zA-Z]) ?")
_AND = re.compile(r" ?(?:\\land|\\wedge|(?<![a-zA-Z\\])and)(?![a-zA-Z]) ?")
_UNEQUAL = re.compile(rf"^({VARIABLE}) ?(?:\\neq?(?![a-z])|≠) ?(.+)$")
_REALS = re.compile(r"\\mathbb\{R\}|(?:all )?real numbers|all reals")


def read(text: str) -> tuple[str, object] | None:
    """The variable, "" where it is not told, and what is equal for equal sets; None unless a canonical text is a set.

    A pair is also an interval, (2,5) a point or a set; where its first value is not the smaller one, and where there
    are more than two, it is a list.
    """
    match = _BRACKETED.fullmatch(text)
    if match and len(parts := _COMMA.split(match[2])) > 1 and "=" not in text:
        values = [end(part) for part in parts]
        low, high = values[0], values[1]
        if None in values or low is None or high is None:
            return None
        if len(values) > 2 or low >= high:
            return "", (match[1], *values, match[3])
    return _union(text)


def end(text: str) -> End | None:
    """The value of a number or of an infinity."""
    infinite = _INFINITY.fullmatch(text.strip())
    return float(f"{infinite[1]}inf") if infinite else number(text)


def notation(text: str) -> str:
    """Several inequalities, or what a set is built of, as intervals in LaTeX; any other text is as it was."""
    stated = _stated(written := canonical(text))
    if stated is None or (sum(map(len, stated)) == 1 and not _BUILDER.fullmatch(written)) or len(_names(stated)) > 1:
        return text
    alternatives = (" \\cap ".join(f"{o}{low},{high}{c}" for _, low, o, high, c in parts) for parts in stated)
    return " \\cup ".join(alternatives)


def _union(text: str) -> tuple[str, object] | None:
    stated = _stated(text)
    if stated is None:
        return None
    found: list[Interval] = []
    for conditions in stated:
        common: Interval = (-math.inf, "(", math.inf, ")")
        for _, low_text, opens, high_text, closes in conditions:
            low, high = end(low_text), end(high_text)
            if low is None or high is None or low >= high:
                return None
            common = _intersection(common, (low, opens, high, closes))
        if common[0] > common[2] or (common[0] == common[2] and (common[1], common[3]) != ("[", "]")):
            return None  # an answer does not state an empty set so
        found.append(common)
    names = _names(stated)
    return (next(iter(names), ""), _joined(found)) if len(names) < 2 else None


def _names(stated: list[list[_Condition]]) -> set[str]:
    return {name for conditions in stated for name, *_ in conditions if name}


def _stated(text: str) -> list[list[_Condition]] | None:
    """The alternatives of a union, each a list of conditions that all hold."""
    name = ""
    if opening := _BUILDER.fullmatch(text):
        name, text = opening[1], opening[2]
    elif opening := _MEMBER.match(text):
        name, text = opening[1], text[opening.end() :]
    found = []
    for alternative in _OR.split(_UNEQUAL.sub(r"\1<\2 or \1>\2", text)):
        conditions = [_condition(part) for part in _AND.split(alternative)]
        found.append([(one[0] or name, *one[1:]) for one in conditions if one is not None])
        if None in conditions or any(one[0] not in ("", name) for one in conditions if name and one is not None):
            return None
    return found


def _condition(text: str) -> _Condition | None:
    """One interval, or a variable between two values or on one side of one."""
    if _REALS.fullmatch(text):
        return "", "-\\infty", "(", "\\infty", ")"
    if match := _BRACKETED.fullmatch(text):
        ends = _COMMA.split(match[2])
        return ("", ends[0], match[1], ends[1], match[3]) if len(ends) == 2 else None
    parts = _RELATION.split(text)
    if not {"<", "\\le"}.intersection(parts):  # all the other way round
        parts = [{">": "<", "\\ge": "\\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        parts = ["-\\infty", "<", *parts] if _UNKNOWN.fullmatch(parts[0]) else [*parts, "<", "\\infty"]
    if len(parts) != 5 or not _UNKNOWN.fullmatch(parts[2]) or not {"<", "\\le"}.issuperset(parts[1::2]):
        return None
    low, below, name, above, high = parts
    opens = "[" if below == "\\le" and not _INFINITY.fullmatch(low) else "("
    return name, low, opens, high, "]" if above == "\\le" and not _INFINITY.fullmatch(high) else ")"


def _intersection(first: Interval, second: Interval) -> Interval:
    low, opens = max((first[:2], second[:2]), key=lambda side: (side[0], side[1] == "("))
    high, closes = min((first[2:], second[2:]), key=lambda side: (side[0], side[1] == "]"))
    return low, opens, high, closes


def _joined(intervals: list[Interval]) -> tuple[Interval, ...]:
    """In order, those that overlap or touch as one."""
    found: list[Interval] = []
    for one in sorted(intervals, key=lambda interval: (interval[0], interval[1] == "(")):
        if not found or one[0] > found[-1][2] or (one[0] == found[-1][2] and (found[-1][3], one[1]) == (")", "(")):
            found.append(one)
        else:
            low, opens, high, closes = found[-1]
            high, closes = max((high, closes), one[2:], key=lambda side: (side[0], side[1] == "]"))
            found[-1] = low, opens, high, closes
    return tuple(found)
