"""Numbers as people and LaTeX write them, read exactly, as fractions."""

import re
from fractions import Fraction

from luciola.verify import units
from luciola.verify.calculation import NAME
from luciola.verify.spelling import MAX_ANSWER, canonical

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>[0-9]+)(?: (?=[0-9]+/)|(?=\\frac)))?"
    rf"(?:(?P<above>{_DECIMAL})/(?P<below>{_DECIMAL})"
    rf"|\\frac ?(?:\{{(?P<up>[+-]?{_DECIMAL})\}}|(?P<up_digit>[0-9]))"
    rf" ?(?:\{{(?P<low>[+-]?{_DECIMAL})\}}|(?P<low_digit>[0-9]))"
    r"|10\^\{?(?P<ten>[+-]?[0-9]{1,3})\}?"
    r"|(?P<start>[0-9]*\.[0-9]*) ?\\(?:overline|bar) ?(?:\{(?P<period>[0-9]+)\}|(?P<period_digit>[0-9]))"
    rf"|(?P<decimal>{_DECIMAL})(?:(?:[eE]|(?:\*|×|\\times|\\cdot) ?10\^)\{{?(?P<exponent>[+-]?[0-9]{{1,3}})\}}?)?)"
)
_NAMED = re.compile(rf"^{NAME}(?:=|\\in ?(?![a-z]))")


def number(text: str) -> Fraction | None:
    """The exact value of a number, or None for anything else.

    Integers, decimals, also repeating ones (`0.1\\overline{6}`), fractions (`3/4`, `\\frac34`), mixed numbers
    (`1 1/2`), thousands separators (`1,000`, not `1,00`), scientific notation with an exponent below 1000; each perhaps
    behind `x =` and before a percent sign or a unit (`units.py`). Only the digits 0 to 9: neither `٣` nor `4²` nor `½`
    is read.
    """
    text = without_name(canonical(text))
    match = _NUMBER.match(text) if len(text) <= MAX_ANSWER else None
    if match is None or not (match.end() == len(text) or units.is_unit(text[match.end() :])):
        return None
    part = {name: digits.replace(",", "") for name, digits in match.groupdict().items() if digits}
    if "ten" in part:
        value = Fraction(10) ** int(part["ten"])
    elif "start" in part:
        start, period = part["start"], part.get("period") or part["period_digit"]
        places = len(start.partition(".")[2])
        value = Fraction(start + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    elif "decimal" in part:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part.get("exponent", 0))
    else:
        above = Fraction(part.get("above") or part.get("up") or part["up_digit"])
        below = Fraction(part.get("below") or part.get("low") or part["low_digit"])
        if below == 0:
            return None
        value = Fraction(part.get("whole", 0)) + above / below
    return -value if part.get("sign") == "-" else value


def without_name(canonical: str) -> str:
    """`5` of `x = 5`, of `\\text{Area} = 5` and of `x \\in 5`."""
    return _NAMED.sub("", canonical)
