"""The process that writes problems of reasoning-gym and scores answers to them. `luciola.verify.pool` starts it by file
name, with a fixed hash seed, and may kill it.

In: ["write", task, settings, seed, seconds]. Out: {"question", "answer"}, null where only the scorer can tell.
In: ["score", task, settings, seed, answer, seconds]. Out: {"kind", "detail"}.
"""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from luciola.tasks.reasoning_gym import names
from luciola.verify.serving import serve

FULL_SCORE = 1 - 1e-6  # scorers that add parts up lose the last bits; one wrong letter in a page costs more


def reply(what: str, name: str, settings: dict[str, Any], seed: int, *answer: str) -> dict[str, Any]:
    """A problem as it is put to the model, or the verdict on an answer to it."""
    if what == "score":
        return score(name, settings, seed, *answer)
    try:
        _, entry = _written(name, settings, seed)
    except Exception as error:
        return {"kind": "crash", "detail": f"{type(error).__name__}: {error}"}
    return {"question": entry["question"], "answer": None if entry["answer"] is None else str(entry["answer"])}


def score(name: str, settings: dict[str, Any], seed: int, answer: str) -> dict[str, str]:
    """The verdict of the task's own scorer, and of a stricter check where that scorer pays what is wrong."""
    made, entry = _written(name, settings, seed)
    truth = entry["answer"]
    try:
        points = float(made.score_answer(answer, entry=entry))
    except MemoryError:
        raise
    except Exception as error:
        # A scorer that can read its own answer has stumbled over this one: it is no answer in the form that was asked.
        made.score_answer("" if truth is None else str(truth), entry=_written(name, settings, seed)[1])
        return {"kind": "wrong", "detail": f"the scorer cannot read it ({type(error).__name__})"}
    if points >= FULL_SCORE and name in STRICTER and not STRICTER[name](answer, str(truth)):
        return {"kind": "wrong", "detail": "paid by the task's scorer, but not the answer"}
    return {"kind": "correct" if points >= FULL_SCORE else "wrong", "detail": _part(points)}


def _part(points: float) -> str:
    return f"score {points:g}" if 0 < points < FULL_SCORE else ""


def _written(name: str, settings: dict[str, Any], seed: int) -> tuple[Any, dict[str, Any]]:
    """The data set of one problem, and the problem: the same in every worker, whatever it has done before."""
    made, entry = _made(name, json.dumps(settings), seed)
    return made, deepcopy(entry)  # some scorers write into it


@lru_cache(maxsize=8)  # the completions of a group come one after the other, and writing may take seconds
def _made(name: str, settings: str, seed: int) -> tuple[Any, dict[str, Any]]:
    from reasoning_gym import create_dataset

    random.seed(seed)  # a few tasks draw from the generators that all of a process share
    np.random.seed(seed)
    made = create_dataset(name, seed=seed, size=1, **json.loads(settings))
    return made, made[0]


def _same_text(answer: str, truth: str) -> bool:
    """Equal but for case and white space."""
    return "".join(answer.casefold().split()) == "".join(truth.casefold().split())


def _near(answer: str, truth: str) -> bool:
    """Equal numbers, as decimals or fractions, up to the tolerance of coin_flip."""
    with suppress(ValueError, ZeroDivisionError):
        return abs(Fraction(answer.replace(",", "")) - Fraction(truth)) <= Fraction(1, 10_000)
    return False


def _finite(answer: str, _: str) -> bool:
    return "nan" not in answer.casefold()


# What must hold as well for an answer to be right, of tasks whose scorers give the full score to others too.
STRICTER: dict[str, Callable[[str, str], bool]] = {
    "coin_flip": _near,  # any beginning of the number, "0" for 0.25
    "complex_arithmetic": _finite,  # nan
    "game_of_life_halting": _same_text,  # every text
    "letter_jumble": _same_text,  # whatever is written after the answer
    "spell_backward": _same_text,
    "word_sorting": _same_text,
}

if __name__ == "__main__":
    names()  # imports the package before the clock runs
    serve(reply)
