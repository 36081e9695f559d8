"""Units behind an answer, money, temperatures and halves of the day among them: which it has, and what is left without.

A unit is not asked for where the reference has none, nor has it to be repeated: "12 cm" and "12" are equal. But "12 km"
is not "12 cm", and "12 km" not "12 km/h". Nothing is converted, and units that are not listed here are not compared,
except in rates ("5 apples per hour").
"""

import re
from functools import lru_cache

from luciola.verify.spelling import MAX_ANSWER, laid_out

Unit = dict[str, int]  # km/h^2 is {"km": 1, "h": -2}

_SPELLINGS = {  # the first is its name
    "length": "mm,millimet* cm,centimet* m,met* km,kilomet* in,inch,inches ft,foot,feet yd,yard,yards mi,mile,miles",
    "mass": "mg,milligram,milligrams g,gram,grams kg,kilogram,kilograms lb,lbs oz,ounce,ounces pound,pounds",
    "time": "s,sec,second,seconds min,minute,minutes h,hr,hrs,hour,hours day,days week,weeks month,months year,years",
    "of the day": "am,Am,AM pm,Pm,PM",
    "volume": "mL,ml,millilit* L,l,lit* gallon,gallons",
    "money": "dollar,dollars,USD,$ cent,cents,¢ euro,euros,EUR,€ GBP,£ yen,JPY,¥",
    "temperature": "Celsius,celsius Fahrenheit,fahrenheit",
    "rest": "degree,degrees,° radian,radians %,percent",
}
_VAGUE = {"pound": ("lb", "GBP"), "degree": ("Celsius", "Fahrenheit")}
_MONEY = {"dollar", "cent", "euro", "GBP", "yen", "pound"}
_ENDINGS = ("er", "ers", "re", "res")  # of metre and litre
_NAMES = {
    spelling.replace("*", ending): spellings.partition(",")[0]
    for kinds in _SPELLINGS.values()
    for spellings in kinds.split()
    for spelling in spellings.split(",")
    for ending in (_ENDINGS if spelling.endswith("*") else ("",))
}
_DEGREES = r"(?:\^\s?\{?\s?\\circ\s?\}?|°|(?<![a-zA-Z])degrees?)\s?"
_REWRITTEN: list[tuple[re.Pattern[str], str]] = [  # so that every unit is a listed one, behind its number
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r"(?<=[0-9]) ?([aApP])\.?[mM]\.?$"), r" \1m"),
    (re.compile(r"\.$"), ""),
    (re.compile(_DEGREES + r"(?:C|Celsius)$"), " Celsius"),
    (re.compile(_DEGREES + r"(?:F|Fahrenheit)$"), " Fahrenheit"),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?"), "°"),
    (re.compile(r"(?<![a-zA-Z])mph$"), "mi/h"),
    (re.compile(r"(?<![a-zA-Z])(?:kph|kmh|kmph)$"), "km/h"),
    (re.compile(r"\\cents?(?![a-zA-Z])"), "¢"),
    (re.compile(r"(?:US(?= ?\\?\$) ?)?(?:(USD|EUR|GBP|JPY)|\\?([$€£¥])) ?(-?[0-9.,]*[0-9])"), r"\3 \1\2"),
]
_MATHS = re.compile(r"(?<!\\)\$")
_LISTED = "|".join(re.escape(name) for name in sorted(_NAMES, key=len, reverse=True))
_FACTOR = re.compile(
    rf"(?:\b(square|cubic|sq\.?|cu\.?) )?(?<![a-zA-Z\\])({_LISTED})(?![a-zA-Z])"
    r"(?: ?\^ ?\{? ?(-?[1-3]) ?\}?| (squared|cubed))?"
)
_UNIT = re.sub(r"\((?!\?)", "(?:", _FACTOR.pattern)
_PRODUCT = rf"(?>{_UNIT}(?:(?: ?(?:\*|·|\\cdot) ?| ){_UNIT})*+)"  # read in one way only, or it takes for ever
_PER = r"(?: ?/ ?| per | an? )"
_RATE = rf"(?:{_PRODUCT}|(?<= )[a-zA-Z]{{2,}}+)(?:{_PER}(?:{_PRODUCT}|[a-zA-Z]{{2,}}+))++"
_WHOLE = re.compile(rf" ?({_RATE}|{_PRODUCT})")
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}
_LONGEST = 60  # characters of a unit
_UNFINISHED = tuple("/_^+-*={(")  # what stands before a unit no unit can follow
_NUMERIC = re.compile(r"^[a-zA-Z] ?=|\\(?:frac|sqrt|pi|times|cdot)(?![a-zA-Z])|[^a-zA-Z\\]")


@lru_cache(maxsize=4096)
def split(text: str) -> tuple[str, Unit]:
    """An answer without its unit, and the unit, empty where none is listed.

    A single letter may be a variable: it is told as a unit behind a number, and yet stays.
    """
    if len(text) > MAX_ANSWER:
        return text, {}
    written = laid_out(text)
    if len(_MATHS.findall(written)) % 2 == 0:  # $x$ is a formula, $5 is money
        written = _MATHS.sub("", written)
    for pattern, replacement in _REWRITTEN:
        written = pattern.sub(replacement, written)
    for found in _WHOLE.finditer(written, max(0, len(written) - _LONGEST)):
        if found.end() == len(written):
            before = written[: found.start()].rstrip()
            if not re.search(r"[0-9\\]", before) or before.endswith(_UNFINISHED):
                break
            names = [name for _, name, _, _ in _FACTOR.findall(found[1])]
            if all(len(name) == 1 and (name.isalpha() or name == "°") for name in names):
                if _NUMERIC.sub("", before):  # 2m + s, sin 30°
                    break
                return (before if names == ["°"] else text), _read(found[1])
            return before, _read(found[1])
    return text, {}


def agree(unit: Unit, due: Unit) -> bool:
    """Whether two units are the same, as far as both are told: "12 degrees" may be Celsius, "$5" may be by the hour."""
    first, second = _settled(unit, due), _settled(due, unit)
    if first == second or not first or not second:
        return True
    shorter, longer = sorted((first, second), key=len)
    return len(shorter) == 1 and shorter.items() <= longer.items() and not _MONEY.isdisjoint(shorter)


def is_unit(canonical: str) -> bool:
    """Whether a text is one listed unit or rate, and nothing else."""
    return _WHOLE.fullmatch(canonical) is not None


def told(unit: Unit) -> str:
    """The unit for people: "m s^-2"."""
    return " ".join(name + (f"^{power}" if power != 1 else "") for name, power in unit.items())


def _settled(unit: Unit, other: Unit) -> Unit:
    return {next((m for m in _VAGUE.get(name, ()) if m in other), name): power for name, power in unit.items()}


def _read(text: str) -> Unit:
    unit: Unit = {}
    for place, product in enumerate(re.split(_PER, text)):
        factors = _FACTOR.findall(product) or [("", product, "", "")]
        for before, name, power, behind in factors:
            name = _NAMES.get(name) or name.removesuffix("s")
            exponent = int(power or _POWERS.get(before or behind, 1))
            unit[name] = unit.get(name, 0) + (-exponent if place else exponent)
    return unit
