"""What completions earn: a weighted sum of named parts, each logged.

    reward = accuracy * right + format * form + length * brevity - repetition * repeats + language * consistency
             + the sum over one's own functions of weight * value

P problems, G completions of each. A part whose verifier crashed or timed out is not a 0: the completion's verdict says
so, and its reward is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from luciola.engine.sequence import Completion
from luciola.recipe import RewardSection
from luciola.tasks.base import Problem
from luciola.tasks.judge import Judging
from luciola.verify import own
from luciola.verify.style import format_reward, language_reward, length_rewards, repetition_reward
from luciola.verify.verdict import VERIFIER_FAILED, Verdict

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
    completions: Sequence[Sequence[Completion]],
    verdicts: Sequence[Sequence[Verdict]],
    called: Mapping[str, Sequence[Sequence[Verdict]]],
    step: int,
) -> Rewards:
    """The reward of every completion of step `step`, from its text, the task's verdicts, and what each of one's own
    functions said when it was `called`.

    Raises ValueError when the task's verifier and the functions together fail on more than 5 %.
    """
    texts = [[completion.text for completion in group] for group in completions]
    judged = [list(group) for group in verdicts]
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
        judged = [
            [new if new.kind in VERIFIER_FAILED and old.kind not in VERIFIER_FAILED else old for old, new in pairs]
            for pairs in (zip(old, new, strict=True) for old, new in zip(judged, called[name], strict=True))
        ]
    judged = refuse_failures(chain.from_iterable(judged), [len(group) for group in judged], step)
    weights = {"accuracy": section.accuracy, "format": section.format, "length": section.length}
    weights |= {"repetition": section.repetition, "language": section.language, **section.own}
    parts_PG = {name: torch.tensor(values, dtype=torch.float32) for name, values in parts.items()}
    return Rewards(
        verdicts=judged,
        parts=parts_PG,
        total_PG=torch.stack([weights[name] * values_PG for name, values_PG in parts_PG.items()]).sum(0),
        known_PG=torch.tensor([[verdict.kind not in VERIFIER_FAILED for verdict in group] for group in judged]),
    )


def refuse_failures(verdicts: Iterable[Verdict], sizes: Sequence[int], step: int) -> list[list[Verdict]]:
    """The verdicts of a step's completions as groups of these sizes, waited for one after the other.

    Raises ValueError as soon as more than 5 % of all the step's completions have failed, not only after the last.
    """
    failed, seen, total = [], [], sum(sizes)
    for verdict in verdicts:
        seen.append(verdict)
        if verdict.kind in VERIFIER_FAILED:
            failed.append(verdict)
        if len(failed) > TOO_MANY_FAILURES * total:
            raise ValueError(
                f"the verifier failed on {len(failed)} of the first {len(seen)} completions of step {step + 1}, which "
                f"is over {TOO_MANY_FAILURES:.0%} of its {total} ({failed[0].kind}: {failed[0].detail}); "
                "rewards would be wrong, so the run has stopped; mend the verifier or give it more time"
            )
    each = iter(seen)
    return [list(islice(each, size)) for size in sizes]


def _lengths(group: Sequence[Completion], verdicts: Sequence[Verdict]) -> list[float]:
    return length_rewards([len(c.token_ids) for c in group], [verdict.kind == "correct" for verdict in verdicts])
