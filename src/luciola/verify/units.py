"""Units of measurement behind an answer: which one it is, and the answer without it.

A unit is not asked for where the reference has none, nor has it to be repeated: "12 cm" and "12" are equal. But "12 km"
is not "12 cm". Nothing is converted, and units that are not listed here are not compared.
"""

import re

_SPELLINGS = {  # the first is its name
    "length": "mm,millimet* cm,centimet* m,met* km,kilomet* in,inch,inches ft,foot,feet yd,yard,yards mi,mile,miles",
    "mass": "mg,milligram,milligrams g,gram,grams kg,kilogram,kilograms lb,lbs,pound,pounds oz,ounce,ounces",
    "time": "s,sec,second,seconds min,minute,minutes h,hr,hrs,hour,hours day,days week,weeks month,months year,years",
    "volume": "mL,ml,millilit* L,l,lit* gallon,gallons",
    "rest": "dollar,dollars cent,cents degree,degrees radian,radians %,percent",
}
_ENDINGS = ("er", "ers", "re", "res")  # of metre and litre
_NAMES = {
    spelling.replace("*", ending): spellings.partition(",")[0]
    for kinds in _SPELLINGS.values()
    for spellings in kinds.split()
    for spelling in spellings.split(",")
    for ending in (_ENDINGS if spelling.endswith("*") else ("",))
}
_LISTED = "|".join(sorted(_NAMES, key=len, reverse=True))
_TAIL = re.compile(
    rf" ?(?:\b(?P<prefix>square|cubic|sq\.?) )?(?P<unit>%|(?<![a-zA-Z\\])(?:{_LISTED}))"
    r"(?: ?\^ ?\{?(?P<power>[23])\}?)?"
)
_POWERS = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3"}


def unit_of(canonical: str) -> str | None:
    """The listed unit at the end of a text (`plain.canonical`), such as "cm" or "cm^2"; None where there is none."""
    found = _at_end(canonical)
    if found is None:
        return None
    power = found["power"] or _POWERS.get(found["prefix"], "1")
    return _NAMES[found["unit"]] + ("" if power == "1" else f"^{power}")


def without_unit(canonical: str) -> str:
    """The text without a listed unit at its end. A single letter may be a variable, and stays."""
    found = _at_end(canonical)
    return canonical if found is None or len(found["unit"]) == 1 else canonical[: found.start()].rstrip()


def _at_end(text: str) -> re.Match[str] | None:
    """The unit that ends the text and has a number, a bracket or a command before it."""
    tail = text[-40:]
    start = len(text) - len(tail)
    for found in _TAIL.finditer(tail):
        if found.end() == len(tail) and start + found.start() > 0:
            return _TAIL.fullmatch(text, start + found.start())
    return None
