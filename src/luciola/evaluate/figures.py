"""The figures of an evaluation: shares of right answers with their intervals, for all problems and by category.

Every interval is Wilson's, 95 %, over problems (`metrics.wilson_interval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luciola.evaluate.metrics import maj_at_k, pass_at_k, wilson_interval
from luciola.tasks.base import Problem
from luciola.verify import answer
from luciola.verify.style import format_reward
from luciola.verify.verdict import KINDS, Verdict


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion of a problem and what the verifier says of it; `tokens` counts the end token."""

    text: str
    tokens: int
    finish_reason: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """One held-out problem: the greedy completion first, then the samples; and the seconds spent on it."""

    problem: Problem
    attempts: list[Attempt]
    seconds: float

    @property
    def greedy(self) -> Attempt:
        return self.attempts[0]

    @property
    def samples(self) -> list[Attempt]:
        return self.attempts[1:]


def figures(judged: Sequence[Judged], answers: bool = True) -> dict[str, Any]:
    """All figures of one task; `luciola.evaluate.run.evaluate` lists them.

    Without `answers`, where completions are programs, there is neither a majority nor the R1 form.

    Raises:
        ValueError: nothing was judged.
    """
    count = len(judged)
    if count == 0:
        raise ValueError("the task has no held-out problem to evaluate on; raise its held-out share")
    first = [row.greedy for row in judged]
    kinds = [attempt.verdict.kind for row in judged for attempt in row.attempts]
    categories: dict[str, dict[str, list[Judged]]] = {}
    for row in judged:
        for kind, category in row.problem.categories:
            categories.setdefault(kind, {}).setdefault(category, []).append(row)
    return {
        **shares(judged, answers),
        **({"format_rate": sum(format_reward(attempt.text) for attempt in first) / count} if answers else {}),
        "truncated": sum(attempt.finish_reason == "length" for attempt in first) / count,
        "mean_length": sum(attempt.tokens for attempt in first) / count,
        "verdicts": {kind: kinds.count(kind) for kind in KINDS},
        "tokens": sum(attempt.tokens for row in judged for attempt in row.attempts),
        "seconds": round(sum(row.seconds for row in judged), 2),
        **(
            {
                "categories": {
                    kind: {category: shares(rows, answers) for category, rows in sorted(found.items())}
                    for kind, found in sorted(categories.items())
                }
            }
            if categories
            else {}
        ),
    }


def shares(judged: Sequence[Judged], answers: bool = True) -> dict[str, Any]:
    """The shares of right answers among these problems: greedy accuracy, and pass@k and maj@k of their samples.

    pass@k is given for k = 1, 2, 4, ... below the number n of samples, and as "pass@k" and "maj@k" for k = n; the last
    where completions hold `answers` that can vote.
    """
    count, n = len(judged), len(judged[0].samples)
    found: dict[str, Any] = {"problems": count, "samples": n}
    _add(found, "accuracy", [float(row.greedy.verdict.kind == "correct") for row in judged])
    if n:
        correct = [[attempt.verdict.kind == "correct" for attempt in row.samples] for row in judged]
        for k in (2**i for i in range(n.bit_length()) if i == 0 or 2**i < n):
            _add(found, f"pass@{k}", [pass_at_k(n, sum(c), k) for c in correct])
        _add(found, "pass@k", [pass_at_k(n, sum(c), n) for c in correct])
        if answers:
            votes = [[answer.extract(attempt.text) for attempt in row.samples] for row in judged]
            _add(found, "maj@k", [maj_at_k(v, c) for v, c in zip(votes, correct, strict=True)])
    return found


def _add(found: dict[str, Any], name: str, values: list[float]) -> None:
    """The mean of one value a problem, with its interval."""
    found[name] = sum(values) / len(values)
    found[f"{name}_low"], found[f"{name}_high"] = wilson_interval(min(sum(values), len(values)), len(values))
