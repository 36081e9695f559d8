"""Units behind an answer, money, temperatures and halves of the day among them: which it has, and what is left without.

A unit is not asked for where the reference has none, nor has it to be repeated: "12 cm" and "12" are equal. But "12 km"
is not "12 cm", and "12 km" not "12 km/h". Nothing is converted. Spellings of one unit are listed here, SI units with
their prefixes; a word that is not listed is a unit of its own behind a number ("5 apples", "5 red apples per hour"),
its plural the same one, unless it counts or calculates ("5 dozens", "5 squared", "5 and a half").
"""

import re
from functools import lru_cache

from luciola.verify.calculation import GREEK, NAME
from luciola.verify.spelling import MAX_ANSWER, laid_out

Unit = dict[str, int]  # km/h^2 is {"km": 1, "h": -2}

_SPELLINGS = {  # the first is its name
    "length": "in,inch,inches ft,foot,feet yd,yard,yards mi,mile,miles",
    "mass": "ton,tons,tonne,tonnes lb,lbs oz,ounce,ounces pound,pounds",
    "time": "s,sec,second,seconds min,mins,minute,minutes h,hr,hrs,hour,hours day,days week,weeks month,months "
    "year,years",
    "of the day": "am,Am,AM pm,Pm,PM",
    "volume": "mL,ml gallon,gallons",
    "money": "dollar,dollars,buck,bucks,USD,$ cent,cents,¢ euro,euros,EUR,€ GBP,£ yen,JPY,¥",
    "temperature": "Celsius,celsius Fahrenheit,fahrenheit",
    "rest": "degree,degrees,° radian,radians %,percent unit,units",
}
_SI_WORDS = (
    "m,meter,metre g,gram s,second L,liter,litre N,newton J,joule W,watt V,volt A,ampere,amp Pa,pascal Hz,hertz "
    "C,coulomb F,farad Ω,ohm K,kelvin T,tesla mol,mole eV,electronvolt cal,calorie Wh,watthour bar"
)
_SI = {symbol: words for symbol, *words in (spellings.split(",") for spellings in _SI_WORDS.split())}
_PREFIXES = {"": "", "n": "nano", "µ": "micro", "m": "milli", "c": "centi", "d": "deci", "k": "kilo", "M": "mega"}
_PREFIXES |= {"G": "giga"}
_VAGUE = {"pound": ("lb", "GBP"), "degree": ("Celsius", "Fahrenheit"), "C": ("Celsius",), "F": ("Fahrenheit",)}
_MONEY = {"dollar", "cent", "euro", "GBP", "yen", "pound"}
_NAMES = {short + symbol: short + symbol for symbol in _SI for short in _PREFIXES}
_CAPITALS = {symbol for symbol in _NAMES if symbol.isupper() and symbol.isascii() and symbol != "L"}
_NAMES |= {
    long + word + plural: short + symbol
    for symbol, words in _SI.items()
    for word in words
    for short, long in _PREFIXES.items()
    for plural in ("", "s")
}
_NAMES |= {
    spelling: spellings.partition(",")[0]
    for kinds in _SPELLINGS.values()
    for spellings in kinds.split()
    for spelling in spellings.split(",")
}
_LISTED = set(_NAMES.values())
_NO_UNITS = re.compile(
    r"or|and|to|not|out|mod|modulo|minus|plus|less|times|over|divided|by|point|square|cubic|squared|cubed|factorial|"
    r"halved|doubled|twice|tripled?|negative|repeating|recurring|mil|gross|grand|"
    r"(?:half|halve|third|quarter|tenth|hundred|hundredth|thousand|thousandth|(?:m|b|tr|quadr|quint)illion|lakh|crore|"
    r"googol|dozen|score|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)(?:e?s)?|"
    rf"pi|{GREEK}",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-zA-Z]+")
_DEGREES = r"(?:\^\s?\{?\s?\\circ\s?\}?|°|(?<![a-zA-Z])degrees?)\s?"
_REWRITTEN: list[tuple[re.Pattern[str], str]] = [  # so that every unit stands in letters or one sign behind its number
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r"(?<=[0-9]) ?([aApP])\.?[mM]\.?$"), r" \1m"),
    (re.compile(r"\.$"), ""),
    (re.compile(r"(?<=[a-zA-Z]) of [a-zA-Z ]+$"), ""),  # liters of water
    (re.compile(_DEGREES + r"(?:C|Celsius)$"), " Celsius"),
    (re.compile(_DEGREES + r"(?:F|Fahrenheit)$"), " Fahrenheit"),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?"), "°"),
    (re.compile(r"(?<![a-zA-Z])mph$"), "mi/h"),
    (re.compile(r"(?<![a-zA-Z])(?:kph|kmh|kmph)$"), "km/h"),
    (re.compile(r"\\cents?(?![a-zA-Z])"), "¢"),
    (re.compile(r"(?:US(?= ?\\?\$) ?)?(?:(USD|EUR|GBP|JPY)|\\?([$€£¥])) ?(-?[0-9.,]*[0-9])"), r"\3 \1\2"),
]
_MATHS = re.compile(r"(?<!\\)\$")
_FACTOR = re.compile(
    r"(?:\b(square|cubic|sq\.?|cu\.?) )?((?<![a-zA-Zµ\\])(?!(?:per|an?)(?![a-zA-Z]))[a-zA-ZµΩ]++|[°%$¢€£¥])"
    r"(?: ?\^ ?\{? ?(-?[1-3]) ?\}?| (squared|cubed)(?![a-zA-Z]))?"
)
_UNIT = re.sub(r"\((?!\?)", "(?:", _FACTOR.pattern)
_PRODUCT = rf"{_UNIT}(?:(?: ?(?:\*|·|\\cdot) ?| ){_UNIT})*+"
_PER = r"(?: ?/ ?| per | an? )"
_TAIL = re.compile(rf" ?((?:{_PRODUCT}| (?:per|an?) {_PRODUCT})(?:{_PER}{_PRODUCT})*+)$")
_IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s?\{[^{}]*\}\.?\s*$")
_ENDS_IN_UNIT = re.compile(r"(?:[a-zA-ZµΩ°%$¢€£¥]|\^ ?\{? ?-?[1-3] ?\}?)$")
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}
_LONGEST = 60  # characters of a unit
_MOST_WORDS = 2  # that are not listed, in one factor: "red apples"
_UNFINISHED = tuple("/_^+-*={(")  # what stands before a unit no unit can follow
_NUMERIC = re.compile(rf"^{NAME} ?=|\\(?:frac|sqrt|pi|times|cdot)(?![a-zA-Z])|[^a-zA-Z\\]")


@lru_cache(maxsize=4096)
def split(text: str) -> tuple[str, Unit]:
    """An answer without its unit, and the unit, empty where there is none.

    A single letter may be a variable: it is told as a unit behind a number, and yet stays.
    """
    if len(text) > MAX_ANSWER:
        return text, {}
    written = laid_out(text)
    if len(_MATHS.findall(written)) % 2 == 0:  # $x$ is a formula, $5 is money
        written = _MATHS.sub("", written)
    for pattern, replacement in _REWRITTEN:
        written = pattern.sub(replacement, written)
    if not _ENDS_IN_UNIT.search(written):
        return text, {}
    start, in_text = max(0, len(written) - _LONGEST), _IN_TEXT.search(text) is not None
    while found := _TAIL.search(written, start):
        before = written[: found.start()].rstrip()
        if not re.search(r"[0-9\\]", before):
            break
        unit = _read(found[0], in_text or not _NUMERIC.sub("", before))
        if unit is not None and not before.endswith(_UNFINISHED):
            names = [name for _, name, _, _ in _FACTOR.findall(found[1])]
            if all(len(name) == 1 and (name.isalpha() or name == "°") for name in names):
                if _NUMERIC.sub("", before):  # 2m + s, sin 30°
                    break
                return (before if names == ["°"] else text), unit
            return before, unit
        start = found.start(1) + 1  # perhaps a shorter one: in "5 million dollars", in "2 - n cm"
    return text, {}


def agree(unit: Unit, due: Unit) -> bool:
    """Whether two units are the same, as far as both are told.

    "12 degrees" may be Celsius, "$5" may be by the hour, and "5 apples" may be red.
    """
    first, second = _settled(unit, due), _settled(due, unit)
    if first == second or not first or not second:
        return True
    shorter, longer = sorted((first, second), key=len)
    if not shorter.items() <= longer.items():
        return False
    more = {name: power for name, power in longer.items() if name not in shorter}
    by_the_hour = len(shorter) == 1 and not _MONEY.isdisjoint(shorter)
    return by_the_hour or all(name not in _LISTED and power == 1 for name, power in more.items())


def is_unit(canonical: str) -> bool:
    """Whether a text, which stands behind a number, is one unit or rate, and nothing else."""
    found = _TAIL.match(canonical)
    return found is not None and _read(canonical, True) is not None


def counts(canonical: str) -> bool:
    """Whether a text has a word that counts or calculates: a number word, "times", "squared"."""
    return any(_NO_UNITS.fullmatch(word) for word in _WORD.findall(canonical))


def told(unit: Unit) -> str:
    """The unit for people: "m s^-2"."""
    return " ".join(name + (f"^{power}" if power != 1 else "") for name, power in unit.items())


def _settled(unit: Unit, other: Unit) -> Unit:
    return {next((m for m in _VAGUE.get(name, ()) if m in other), name): power for name, power in unit.items()}


def _read(text: str, sure: bool) -> Unit | None:
    """The unit that a text, perhaps with a blank in front, stands for; None when it is none.

    What is not listed can only be one where it is `sure` to be no variable: behind a number, or in \\text{}.
    """
    unit: Unit = {}
    apart = text.startswith(" ")
    for place, product in enumerate(re.split(_PER, text)):
        unlisted = 0
        for square, word, power, squared in _FACTOR.findall(product):
            name = _NAMES.get(word) or _NAMES.get(word.lower() if len(word) > 3 else word.removesuffix("s"))
            if name is None:
                unlisted += 1
                if len(word) < 3 or unlisted > _MOST_WORDS or not (apart and sure) or _NO_UNITS.fullmatch(word):
                    return None
                name = _singular(word.lower())
            elif word in _CAPITALS and not apart:  # 5N may be a product, 5MN of a length
                return None
            exponent = int(power or _POWERS.get(square or squared, 1))
            unit[name] = unit.get(name, 0) + (-exponent if place else exponent)
    return unit


def _singular(word: str) -> str:
    for plural, singular in (("ies", "y"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("sses", "ss"), ("ss", "ss")):
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return word.removesuffix("s")
