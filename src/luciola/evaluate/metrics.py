"""What several samples for each problem say about a model. Every function is about one problem, save the interval."""

import math
from collections.abc import Callable, Sequence

from luciola.verify import answer


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k samples is right, estimated without bias from more of them.

    1 - C(n-c, k) / C(n, k) for c right ones among n samples (Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", equation 1), with the quotient as the product of 1 - k/i over i = n-c+1 .. n, which never forms
    a large binomial.

    Raises:
        ValueError: unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, not {correct=}, {samples=}, {k=}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool] | None = None) -> int | None:
    """The index at which the most frequent answer was first seen; None when no sample has an answer.

    Equal answers vote together, ties go to the answer seen first, and a sample without an answer does not vote.

    Args:
        answers: one for each sample, as `luciola.verify.answer.extract` finds them.
        same: whether two answers are equal; by default as the verifier compares them.
    """
    agree = same or answer.equal
    votes: dict[int, int] = {}
    for index, vote in enumerate(answers):
        if vote is None:
            continue
        leader = next((first for first in votes if agree(str(answers[first]), vote)), index)
        votes[leader] = votes.get(leader, 0) + 1
    return max(votes, key=votes.__getitem__) if votes else None  # max keeps the first of equals, and dicts keep order


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int | None = None) -> float:
    """1.0 when the majority answer of the first k samples (by default all) is right, else 0.0.

    Called cons@k in the R1 report. `correct[i]` says whether sample i is right.

    Raises:
        ValueError: when the lengths differ, or there are fewer than k samples.
    """
    k = len(answers) if k is None else k
    if len(answers) != len(correct) or not 1 <= k <= len(answers):
        raise ValueError(
            f"maj@k needs one verdict for each of {len(answers)} answers, not {len(correct)}; "
            f"and k from 1 to their number, not {k}"
        )
    winner = majority(answers[:k])
    return float(winner is not None and correct[winner])


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a proportion: 95 % confidence with the default z. (0, 1) without any trials.

    It stays inside 0..1 and is honest at 0 % and 100 %, where the usual normal interval and the bootstrap have no
    width. (Wilson 1927.) A trial is a problem, never a sample: samples of one problem are not independent. `successes`
    may be a sum of shares, such as pass@1 of each problem; these vary less than zeros and ones of the same mean, so
    that the interval is then wider than it need be, never too narrow.

    Raises:
        ValueError: unless 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"an interval needs 0 <= successes <= trials; got {successes=}, {trials=}")
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
