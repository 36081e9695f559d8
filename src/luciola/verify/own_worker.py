"""The process that calls reward functions of one's own. `pool.py` starts it by file name and may kill it.

In: [name, seconds] to import a function, [name, prompt, completion, truth, seconds] to call it. Out: {"kind", "detail",
"reward"}.
"""

import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from luciola.verify.serving import serve


def check(name: str, *arguments: str) -> dict[str, Any]:
    """The reward; "crash", with the reason, where there is none."""
    try:
        function = _function(name)
        value = function(*arguments) if arguments else 0.0
    except Exception as error:
        return {"kind": "crash", "detail": f"{type(error).__name__}: {error}"}
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return {"kind": "correct", "detail": "", "reward": float(value)}
    return {"kind": "crash", "detail": f"expected a finite number, got {value!r:.60}"}


@lru_cache
def _function(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    found: Callable[..., object] = getattr(import_module(module), function)
    return found


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    serve(check)
