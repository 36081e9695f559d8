"""A reward function named `module:function`: how it is found, and how what it returns is read.

The trainer's workers and the court both go through here, so that what passes the one is accepted by the other.
"""

import inspect
import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from numbers import Real

from luciola.verify.verdict import Verdict

RewardFunction = Callable[[str, str, str], object]
ACCEPTED = "a finite real number (int, float, bool, numpy scalar or 0-dimensional tensor) or a Verdict"


class Unusable(ValueError):
    """A reward function that cannot be called, or one that has returned no reward. The message is the reason alone."""


def load(name: str) -> RewardFunction:
    """The function that "module:function" names; the module may lie in the current folder.

    Raises:
        Unusable: there is no such function, or it cannot be called with (prompt, completion, truth). Whatever the
            module raises when it is imported is raised as it is.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise Unusable('a reward is named "module:function"')
    if "/" in module or module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        raise Unusable(
            'a reward is named "module:function", a file by its name without .py: my_rewards:accuracy for '
            "my_rewards.py in the folder in which luciola is started"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = import_module(module)
    except ModuleNotFoundError as error:
        raise Unusable(f"there is no module {error.name} here or among the packages") from None
    function = getattr(imported, attribute, None)
    if function is None:
        raise Unusable(f"the module {module} has no {attribute}")
    if not callable(function):
        raise Unusable(f"expected a function, got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C do not tell
        return function  # type: ignore[no-any-return]
    try:
        signature.bind("prompt", "completion", "truth")
    except TypeError:
        raise Unusable(f"expected a function of (prompt, completion, truth), got one of {signature}") from None
    return function  # type: ignore[no-any-return]


def call(function: RewardFunction, prompt: str, completion: str, truth: str) -> Verdict:
    """What the function says: a verdict that it returns, or "correct" with the number that it returns as the reward.

    Raises:
        Unusable: it returns neither. Whatever the function raises is raised as it is.
    """
    said = function(prompt, completion, truth)
    if isinstance(said, Verdict):
        return Verdict(said.kind, _number(said.reward), said.detail)
    return Verdict("correct", _number(said))


def why(error: BaseException) -> str:
    """A short reason for people, of what `load` or `call` raised."""
    return (str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}")[:300]


def _number(said: object) -> float:
    # numpy's scalars and tensors without a dimension give the Python number that they hold; a text in one stays a text
    number = said.item() if getattr(said, "ndim", None) == 0 and hasattr(said, "item") else said
    if not isinstance(number, Real) or not math.isfinite(number):
        raise Unusable(f"expected {ACCEPTED}, got {said!r:.60}")
    return float(number)
