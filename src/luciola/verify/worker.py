"""The process that compares answers by algebra, with math-verify. `pool.py` starts it by file name and may kill it.

In: [answer, truth, seconds]. Out: {"kind", "detail"}. Answers are parsed by a grammar (latex2sympy2_extended, which
math-verify brings), never with eval.
"""

import math
import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Expr, Rational, nan, zoo

from luciola.verify.serving import serve
from luciola.verify.units import without_unit

_NORMALIZE = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
_NAMED = re.compile(r"\s*[a-zA-Z](?:_\w|\(\w\))?\s*")


def check(answer: str, truth: str) -> dict[str, str]:
    """Whether two answers are equal as mathematics. Of a chain `x = 3 + 4 = 7` every side must be, save a name."""
    try:
        gold = _read(truth)
    except Exception as error:
        return {"kind": "crash", "detail": f"the reference cannot be read as mathematics ({type(error).__name__})"}
    sides = _sides(answer)
    if len(sides) > 1 and len(_sides(truth)) == 1:
        sides = [side for side in sides if not _NAMED.fullmatch(side)]
    else:
        sides = [answer]
    for side in sides:
        try:
            value = _read(side)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            return {"kind": "no_answer", "detail": f"the answer cannot be read as mathematics ({type(error).__name__})"}
        if value.has(nan, zoo):
            return {"kind": "no_answer", "detail": "the answer has no value"}
        if _differ_somewhere(gold, value) or not _equal(gold, value):
            return {"kind": "wrong", "detail": ""}
    return {"kind": "correct", "detail": ""} if sides else {"kind": "no_answer", "detail": "a name without a value"}


def _equal(gold: Any, value: Any) -> bool:
    found: bool = verify(
        gold,
        value,
        float_rounding=_decimal_places(gold),
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return found


def _differ_somewhere(gold: Any, value: Any) -> bool:
    """Whether two expressions in the same variables have clearly different values at a point.

    Most wrong answers end here, in a hundredth of the time in which sympy tries to simplify their difference to zero.
    """
    if not (isinstance(gold, Expr) and isinstance(value, Expr)) or gold.free_symbols != value.free_symbols:
        return False
    names = sorted(gold.free_symbols, key=str)
    point = {name: Rational(2 * i + 3, i + 7) for i, name in enumerate(names)}
    try:
        first, second = (complex(side.evalf(15, subs=point)) for side in (gold, value))
    except (TypeError, ValueError, OverflowError, ArithmeticError):  # no number there
        return False
    return abs(first - second) > 1e-3 * (1 + abs(first) + abs(second))


@lru_cache(maxsize=512)  # a group of completions shares its reference, and often an answer
def _read(text: str) -> Any:
    text = without_unit(text.replace("\\$", "").replace("$", "").strip())
    latex = normalize_latex(text, config=_NORMALIZE)
    return latex2sympy(
        latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
    )


def _sides(text: str) -> list[str]:
    """What stands between the equals signs, save those inside brackets, as in `\\sum_{k=1}`, and in `<=`."""
    sides, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "=" and depth == 0 and not sides[-1].endswith(("<", ">", "!")):
            sides.append("")
        else:
            sides[-1] += character
    return sides


def _decimal_places(gold: Any) -> int:
    """Places that keep six significant digits of a reference value, where math-verify would round 10^-9 to nothing."""
    try:
        size = abs(float(gold.evalf()))
    except (TypeError, AttributeError, ValueError, OverflowError):  # not one real number
        return 6
    if size == 0:
        return 15
    return min(300, 6 + max(0, math.ceil(-math.log10(size)))) if math.isfinite(size) else 6


if __name__ == "__main__":
    serve(check)
