"""The process that calls reward functions of one's own. `pool.py` starts it by file name and may kill it.

In: [name, seconds] to find a function, [name, prompt, completion, truth, seconds] to call it. Out: {"kind", "detail",
"reward"}.
"""

from functools import lru_cache
from typing import Any

from luciola.verify.reward_function import call, load, why
from luciola.verify.serving import serve

FILE_MB = 1024  # for its logs and temporary files

_loaded = lru_cache(load)


def check(name: str, *arguments: str) -> dict[str, Any]:
    """The verdict with its reward; "crash", with the reason, where there is none."""
    try:
        function = _loaded(name)
        if not arguments:
            return {"kind": "correct", "detail": "", "reward": 0.0}
        verdict = call(function, *arguments)
    except (Exception, SystemExit) as error:
        return {"kind": "crash", "detail": why(error)}
    return {"kind": verdict.kind, "detail": verdict.detail, "reward": verdict.reward}


if __name__ == "__main__":
    serve(check, FILE_MB)
