"""Grading many completions at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from luciola import hardware
from luciola.tasks.base import Problem, Task
from luciola.verify.verdict import Verdict


def judge(task: Task, problems: Sequence[Problem], completions: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    """Grade every completion of every problem; verdicts stand in the order of the completions, whoever ends first."""
    pairs = [(problem, text) for problem, group in zip(problems, completions, strict=True) for text in group]
    with ThreadPoolExecutor(hardware.cores()) as threads:
        verdicts = iter(list(threads.map(lambda pair: task.grade(*pair), pairs)))
    return [[next(verdicts) for _ in group] for group in completions]
