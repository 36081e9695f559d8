"""Grading many completions at once, whatever becomes of the graders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

from luciola import hardware
from luciola.tasks.base import GradedElsewhere, Problem, Task
from luciola.verify.verdict import Verdict


def grade(task: Task, problem: Problem, completion: str) -> Verdict:
    """The task's verdict; "crash" where its grader raises: that says nothing about the completion, and is counted."""
    try:
        return task.grade(problem, completion)
    except Exception as error:
        return Verdict("crash", 0.0, f"{type(error).__name__}: {error}")


class Judging:
    """Grades completions; verdicts stand in their order, whoever ends first. Used in a `with` block, whose end waits
    for those that have begun and drops the others.

    Args:
        grade: the verdict on a completion of a problem.
        elsewhere: other processes do it, so that it may begin while further completions are still being sampled.
        together: how many are graded at a time.
    """

    def __init__(
        self, grade: Callable[[Problem, str], Verdict], problems: Sequence[Problem], elsewhere: bool, together: int
    ) -> None:
        self._grade, self._problems, self._elsewhere = grade, problems, elsewhere
        self._threads = ThreadPoolExecutor(together)
        self._asked: dict[tuple[int, str], Future[Verdict]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, place: int, text: str) -> None:
        """A completion of problem number `place` is there."""
        if self._elsewhere:
            self._ask(place, text)

    def _ask(self, place: int, text: str) -> None:
        """Have it graded, once if it equals another of the same problem."""
        if (place, text) not in self._asked:
            self._asked[place, text] = self._threads.submit(self._grade, self._problems[place], text)

    def each(self, completions: Sequence[Sequence[str]]) -> Iterator[Verdict]:
        """The verdict of every completion of every problem, each waited for when it is its turn."""
        for place, group in enumerate(completions):
            for text in group:
                self._ask(place, text)
        for place, group in enumerate(completions):
            for text in group:
                yield self._asked[place, text].result()


def by_task(task: Task, problems: Sequence[Problem]) -> Judging:
    """Judging by the task's own verifier."""
    elsewhere = isinstance(task, GradedElsewhere) and task.graded_elsewhere
    return Judging(partial(grade, task), problems, elsewhere, hardware.cores())


def judge(task: Task, problems: Sequence[Problem], completions: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    """Grade every completion of every problem."""
    with by_task(task, problems) as judging:
        each = judging.each(completions)
        return [[next(each) for _ in group] for group in completions]
