"""The process that compares answers by algebra, with math-verify. `pool.py` starts it by file name and may kill it.

In: [answer, truth, seconds]. Out: {"kind", "detail"}. Answers are parsed by a grammar (latex2sympy2_extended, which
math-verify brings), never with eval.
"""

import math
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Expr, Rational, nan, zoo

from luciola.verify import intervals, plain, units, words
from luciola.verify.calculation import sides, values
from luciola.verify.serving import serve
from luciola.verify.spelling import canonical

_NORMAL = NormalizationConfig(  # its own list of units has "ab" and single letters, which may be variables
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)


def check(answer: str, truth: str) -> dict[str, str]:
    """Whether two answers are equal as mathematics. Of a chain `x = 3 + 4 = 7` every side must be, save a name.

    A reference that cannot be read as mathematics is compared as text.
    """
    answer, truth = (intervals.notation(plain.listed(text)) for text in (answer, truth))
    try:
        gold = _read(truth)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        same = words.words(canonical(answer)) == words.words(canonical(truth))
        return {"kind": "correct" if same else "wrong", "detail": "compared as text, as no algebra reads the reference"}
    unfinished = plain.left_to_compute(canonical(answer), canonical(truth))
    for side in values(answer) if len(sides(truth)) == 1 else [answer]:
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
        # what agrees in more digits than a rounded value would
        if unfinished and isinstance(gold, Expr) and abs(complex(value - gold)) < 1e-12 * abs(complex(gold)):
            return {"kind": "wrong", "detail": "the answer is a calculation where a number is asked for"}
    return {"kind": "correct", "detail": ""}


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
    text = units.split(text)[0].replace("\\$", "").replace("$", "").strip()
    latex = normalize_latex(text, config=_NORMAL)
    return latex2sympy(
        latex, is_real=not should_treat_as_complex(latex), convert_degrees=False, normalization_config=None
    )


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
