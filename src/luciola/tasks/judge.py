"""Grading many completions at once, whatever becomes of the graders."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from luciola import hardware
from luciola.tasks.base import Problem, Task
from luciola.verify.verdict import Verdict


def grade(task: Task, problem: Problem, completion: str) -> Verdict:
    """The task's verdict; "crash" where its grader raises: that says nothing about the completion, and is counted."""
    try:
        return task.grade(problem, completion)
    except Exception as error:
        return Verdict("crash", 0.0, f"{type(error).__name__}: {error}")


def judge(task: Task, problems: Sequence[Problem], completions: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    """Grade every completion of every problem; verdicts stand in the order of the completions, whoever ends first."""
    pairs = [(problem, text) for problem, group in zip(problems, completions, strict=True) for text in group]
    with ThreadPoolExecutor(hardware.cores()) as threads:
        verdicts = iter(list(threads.map(lambda pair: grade(task, *pair), pairs)))
    return [[next(verdicts) for _ in group] for group in completions]
