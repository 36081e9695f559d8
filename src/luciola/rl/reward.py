"""What completions earn: a weighted sum of named parts, each logged.

    reward = accuracy * right + format * form + length * brevity - repetition * repeats + language * consistency
             + the sum over one's own functions of weight * value

P problems, G completions of each. A part whose verifier crashed or timed out is not a 0: the completion's verdict says
so, and its reward is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from luciola.engine.sequence import Completion
from luciola.recipe import RewardSection
from luciola.tasks.base import Problem
from luciola.tasks.judge import Judging
from luciola.text.untrusted import shortened
from luciola.verify import own
from luciola.verify.style import format_reward, language_reward, length_rewards, repetition_reward
from luciola.verify.verdict import VERIFIER_FAILED, Verdict, correct

TOO_MANY_FAILURES = 0.05  # share of verdicts beyond which rewards are not to be trusted


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of a step.

    Attributes:
        verdicts: those of the task, or of the first of one's own functions that failed.
        parts: each part before its weight, (P, G): accuracy and format always, others where they have a weight.
        total_PG, known_PG: the weighted sum, and whether every verifier could tell.
    """

    verdicts: list[list[Verdict]]
    parts: dict[str, Tensor]
    total_PG: Tensor
    known_PG: Tensor


def by_function(name: str, problems: Sequence[Problem]) -> Judging:
    """Judging by one's own function."""

    def called(problem: Problem, text: str) -> Verdict:
        return own.call(name, problem.prompt, text, problem.truth)

    # no more at a time than workers: one that waits for a worker would have begun already
    return Judging(called, problems, elsewhere=True, together=own.workers())


def rewards(
    section: RewardSection,
    problems: Sequence[Problem],
    completions: Sequence[Sequence[Completion]],
    verdicts: Sequence[Sequence[Verdict]],
    called: Mapping[str, Sequence[Sequence[Verdict]]],
    step: int,
    graded: bool = True,
) -> Rewards:
    """The reward of every completion of step `step`, from its text, the task's verdicts, and what each of one's own
    functions said when it was `called`.

    Args:
        graded: something is learnt from the task's verdicts; else they are only logged, and may fail.

    Raises ValueError when the verifiers that count fail together on more than 5 %.
    """
    texts = [[completion.text for completion in group] for group in completions]
    sources = [*([verdicts] if graded else []), *(called[name] for name in section.own)]

    def failure(p: int, g: int) -> Verdict | None:
        return next((source[p][g] for source in sources if source[p][g].kind in VERIFIER_FAILED), None)

    failed = [[failure(p, g) for g in range(len(group))] for p, group in enumerate(verdicts)]
    sizes = [len(group) for group in failed]
    refuse_failures((bad or correct() for group in failed for bad in group), problems, sizes, step)
    parts = {
        "accuracy": [[verdict.reward for verdict in group] for group in verdicts],
        "format": [[format_reward(text) for text in group] for group in texts],
    }
    if section.length:
        parts["length"] = [_lengths(group, given) for group, given in zip(completions, verdicts, strict=True)]
    if section.repetition:
        parts["repetition"] = [[repetition_reward(text) for text in group] for group in texts]
    if section.language:
        parts["language"] = [[language_reward(text, section.target_language) for text in group] for group in texts]
    for name in section.own:
        parts[name] = [[verdict.reward for verdict in group] for group in called[name]]
    weights = {"accuracy": section.accuracy, "format": section.format, "length": section.length}
    weights |= {"repetition": section.repetition, "language": section.language, **section.own}
    parts_PG = {name: torch.tensor(values, dtype=torch.float32) for name, values in parts.items()}
    return Rewards(
        verdicts=[
            [bad or verdict for bad, verdict in zip(*groups, strict=True)]
            for groups in zip(failed, verdicts, strict=True)
        ],
        parts=parts_PG,
        total_PG=torch.stack([weights[name] * values_PG for name, values_PG in parts_PG.items()]).sum(0),
        known_PG=torch.tensor([[bad is None for bad in group] for group in failed]),
    )


def refuse_failures(
    verdicts: Iterable[Verdict], problems: Sequence[Problem], sizes: Sequence[int], step: int
) -> list[list[Verdict]]:
    """The verdicts of a step's completions as groups of these sizes, one a problem, waited for one after the other.

    Raises ValueError as soon as more than 5 % of all the step's completions have failed, not only after the last.
    """
    asked = [problem for problem, size in zip(problems, sizes, strict=True) for _ in range(size)]
    failed, seen = [], []
    for verdict, problem in zip(verdicts, asked, strict=True):
        seen.append(verdict)
        if verdict.kind in VERIFIER_FAILED:
            failed.append((verdict, problem))
        if len(failed) > TOO_MANY_FAILURES * len(asked):
            first, where = failed[0]
            raise ValueError(
                f"the verifier failed on {len(failed)} of the first {len(seen)} completions of step {step + 1}, which "
                f"is over {TOO_MANY_FAILURES:.0%} of its {len(asked)} ({first.kind}: {first.detail}; first at the "
                f"problem {shortened(where.prompt)}, truth {shortened(where.truth)}); rewards would be wrong, so the "
                "run has stopped; mend that truth or the verifier, or give it more time"
            )
    return grouped(seen, sizes)


def grouped(verdicts: Iterable[Verdict], sizes: Sequence[int]) -> list[list[Verdict]]:
    """Verdicts in a row as groups of these sizes."""
    each = iter(verdicts)
    return [list(islice(each, size)) for size in sizes]


def _lengths(group: Sequence[Completion], verdicts: Sequence[Verdict]) -> list[float]:
    return length_rewards([len(c.token_ids) for c in group], [verdict.kind == "correct" for verdict in verdicts])
