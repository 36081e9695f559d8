"""Reward functions of one's own, named `module:function` in a recipe and called in a worker process.

    def brevity(prompt: str, completion: str, truth: str) -> float: ...

The module is found from the folder in which luciola is started, or where it is installed. What may be returned is said
in `reward_function.py`. The function runs in a process with limits of time and memory, so that one which hangs, raises
or returns anything else gives the verdict "timeout" or "crash" and neither stops the run nor passes for a reward of 0.
"""

from __future__ import annotations

from pathlib import Path

from luciola.verify.pool import Pool, shared
from luciola.verify.verdict import VERIFIER_FAILED, Verdict

WORKER = Path(__file__).with_name("own_worker.py")
SECONDS = 10.0
MEMORY_MB = 8192  # of address space: libraries of numbers reserve far more than they use


def check(name: str) -> None:
    """Import the function once, before anything is trained.

    Raises:
        ValueError: there is no such module or function, importing it fails, or it does not take (prompt, completion,
            truth).
    """
    verdict = _pool().check(name)
    if verdict.kind != "correct":
        raise ValueError(f"the reward function {name!r} cannot be used ({verdict.detail}); mend reward.own")


def call(name: str, prompt: str, completion: str, truth: str) -> Verdict:
    """The verdict that the function gives, "correct" with a number of its as the reward; "timeout" or "crash" where
    it fails."""
    verdict = _pool().check(name, prompt, completion, truth)
    if verdict.kind not in VERIFIER_FAILED:
        return verdict
    return Verdict(verdict.kind, 0.0, f"reward function {name}: {verdict.detail}")


def workers() -> int:
    """How many calls run at once."""
    return _pool().size


def _pool() -> Pool:
    return shared(WORKER, seconds=SECONDS, memory_mb=MEMORY_MB)
