"""The process that compares answers by algebra, with math-verify. `pool.py` starts it by file name and may kill it.

Protocol: one line of JSON each way. In: [answer, truth, seconds]. Out: {"kind", "detail"}; first of all a line "ready".

Answers are parsed by a grammar (latex2sympy2_extended, which math-verify brings), never with eval. What the process may
use is limited here; how long it may take is its parent's business, because neither an alarm nor a thread can interrupt
a power of large integers.
"""

import json
import math
import os
import re
import resource
import sys
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import nan, zoo

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
        equal = verify(
            gold,
            value,
            float_rounding=_decimal_places(gold),
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
        if not equal:
            return {"kind": "wrong", "detail": ""}
    return {"kind": "correct", "detail": ""} if sides else {"kind": "no_answer", "detail": "a name without a value"}


def _read(text: str) -> Any:
    latex = normalize_latex(text.replace("\\$", "").replace("$", ""), config=_NORMALIZE)
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


def _limit(memory_mb: int) -> None:
    for what, limit in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        if sys.platform == "linux" or what != resource.RLIMIT_AS:  # macOS refuses to limit address space
            resource.setrlimit(what, (limit, limit))


def _limit_processor_time(seconds: float) -> None:
    """For a parent that dies while this process hangs: end a little after the parent would have ended it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    _limit(int(sys.argv[1]))
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        _limit_processor_time(seconds)
        try:
            reply = check(answer, truth)
        except Exception as error:
            reply = {"kind": "crash", "detail": f"the comparison failed: {type(error).__name__}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
