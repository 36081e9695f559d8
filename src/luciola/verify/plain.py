"""Compare answers that need no algebra: numbers, words, and lists of the wrong length. Fast, exact, in this process.

Numbers are compared exactly, as fractions: a rounded decimal is not the fraction it came from, and there is no
tolerance under which a tiny answer could pass for zero. Where the reference is a number, the answer must be one too:
`6+9` is the question and not the answer when 15 is asked for.
"""

import re
from fractions import Fraction

from luciola.verify import intervals, units, words
from luciola.verify.calculation import VARIABLE, computes, sides, unreasonable
from luciola.verify.exact import number, without_name
from luciola.verify.spelling import MAX_ANSWER, canonical
from luciola.verify.verdict import Verdict, correct, wrong

_INEQUALITY = re.compile(r"[<>≤≥]|\\[lg](?:e|eq|eqq|eqslant|t)(?![a-z])")
_AND = r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])"
# A blank between two numbers, but not in `\log_2 3`, `\frac 1 2` and `1 1/2`.
_BLANK = r"(?<=[0-9])(?<!\\log_[0-9])(?<!\\frac[0-9])(?<!\\frac [0-9]) (?=[0-9])(?![0-9]+/[0-9])"
_SEPARATOR = re.compile(rf"[,;\n]|\\\\|\\q?quad(?![a-zA-Z])|{_AND}|{_BLANK}")
_ROOT = re.compile(rf" ?({VARIABLE})(?:_\{{?[0-9]\}}?)?=")
_BRACKET = re.compile(rf"\s*(?:[(\[{{]|(?!{VARIABLE})\\)")
_MIXED = re.compile(r"(?<=[0-9]) and ?(?=[0-9]+/[0-9]|\\frac)")  # in 2 and 3/4
_CLOCK = re.compile(r"[0-9]{1,2}:0[0-9]")
_BASED = re.compile(
    r"(?:[a-zA-Z]=)?(?P<digits>[+-]?[0-9A-F.,]+)(?:_ ?\{? ?|(?: in)? ?\(?base ?)(?P<base>[0-9]+|[a-z]+) ?[})]?"
)
_BASE = re.compile(r"(?<=[0-9])_ ?\{? ?([0-9]+)")
_WORDS_OF_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_BASES = {word: str(base) for base, word in enumerate(_WORDS_OF_BASES, start=2)}


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
    if ("%" in unit) != ("%" in due) and (value := number(asked)) is not None and (found := number(given)) is not None:
        return correct() if _of_percent(*((found, value) if "%" in unit else (value, found))) else wrong()
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
        answered = number(_MIXED.sub(" ", given))
        if answered is not None or any(found != value for found in stated):
            return correct() if answered == value else wrong()
        if units.counts(given):
            return wrong("the answer is a calculation where a number is asked for")
    if (due_set := intervals.read(asked)) is not None and (given_set := intervals.read(given)) is not None:
        same_name = given_set[0] == due_set[0] or not (given_set[0] and due_set[0])
        return correct() if same_name and given_set[1] == due_set[1] else wrong()
    due_values = None if words.NUMBERS.fullmatch(asked) else _unordered(asked, due)
    if due_values is not None and (values := _unordered(given, unit)) is not None:
        return correct() if _agree(values, due_values) else wrong()
    if (same := words.same(given, asked, truth)) is not None:
        return correct() if same else wrong()
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
    if any(intervals.end(part) is None for part in _parts(without_name(asked))):
        return False
    for part in _parts(without_name(given)):
        states = len(sides(part)) > 1 and any(number(side) is not None for side in sides(part))
        if not states and any(number(term) is None and computes(term) for term in part.split("\\pm")):
            return True
    return False


def listed(text: str) -> str:
    """Several values with commas between them, of `x = 1 or x = 2` as `1, 2`; any other answer is as it was."""
    parts = _parts(canonical(text))
    if len(parts) < 2 or _BRACKET.match(text) or _INEQUALITY.search(text):
        return text
    names = [_ROOT.match(part) for part in parts]
    if len({name[1] if name else "" for name in names}) == 1 and names[0]:
        parts = [_ROOT.sub("", part, count=1) for part in parts]
    elif not re.search(_AND, text):
        return text
    return ", ".join(parts)


def _of_percent(percent: Fraction, plain: Fraction) -> bool:
    """Whether `percent` % is a number that has no such sign.

    50 % is exactly 0.5. It is also 50, as that may be the number of percent; but not below 1, where 0.5 % would pass
    for 0.5.
    """
    return percent == 100 * plain or (percent == plain and abs(plain) >= 1)


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
        return without_name(text).replace(",", ""), ""
    return found["digits"].replace(",", ""), _BASES.get(found["base"], found["base"])


def _minutes(text: str) -> int | None:
    found = re.fullmatch(r"([0-9]{1,2})(?::([0-5][0-9]))?", text)
    return None if found is None else 60 * int(found[1]) + int(found[2] or 0)


def _unordered(text: str, last: units.Unit) -> list[tuple[Fraction, units.Unit]] | None:
    """The values of a list of numbers in no brackets or in braces, where order has no meaning, sorted, with units.

    `last` is the unit that was split off from the text.
    """
    parts = [part for part in _parts(without_name(listed(text))) if "=" not in part]
    found = [(value, units.split(part)[1]) for part in parts if (value := number(part)) is not None]
    if len(found) != _count(text) or len(found) < 2 or text[:1] in ("(", "["):
        return None
    found[-1] = found[-1][0], last or found[-1][1]
    return sorted(found, key=lambda pair: pair[0])


def _agree(values: list[tuple[Fraction, units.Unit]], due: list[tuple[Fraction, units.Unit]]) -> bool:
    same = [value for value, _ in values] == [value for value, _ in due]
    return same and all(units.agree(unit, other) for (_, unit), (_, other) in zip(values, due, strict=True))


def _count(text: str) -> int:
    """How many values a canonical text lists; a plus-minus has both signs."""
    return len(_parts(without_name(text))) * (2 if "\\pm" in text else 1)


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
