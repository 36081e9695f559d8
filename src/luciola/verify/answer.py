"""Grade the final answer of a completion against a reference: the accuracy reward of R1 (report, section 2.2.2).

Which text is the answer? The first row that fits decides, and where it finds none there is no answer:

| the completion                                       | its answer                                                  |
| ---------------------------------------------------- | ----------------------------------------------------------- |
| think tags repeated, nested, unordered or not closed | none                                                        |
| answer tags after the thinking                       | the content of the one <answer> block; none when there are  |
|                                                      | more tags than two, or it is empty or not closed            |
| \\boxed{} after the thinking                         | the content of the last box, provided that all boxes agree  |
| tags, but no answer after the thinking               | none                                                        |
| "answer is ...", and no tag anywhere                 | what follows, provided that all such statements agree       |
| a number, and no tag anywhere                        | the one number that the last sentence with a number states  |

Text without </think> counts as not thought at all. Where the *prompt* opened the thinking, grade "<think>" +
completion, so that a completion cut off inside its thoughts has no answer. An answer block may stand alone, without
thinking: the format reward (`style.py`) teaches the rest. A box inside the block gives its content.

When is it right? Equal spelling after normalisation; equal value as exact fractions where both are numbers
(`exact.py`), and as sets where both are intervals or inequalities (`intervals.py`); the same text where the reference
is words, a date, a sequence (`words.py`) or what algebra cannot read; otherwise math-verify decides in a worker process
(`pool.py`) that has limits of time and memory. A list never passes for one of its members, and a calculation never for
a number that is its result, be it `6 \\times 7` or `\\sqrt{144}`; an equation that ends with the number does
(`calculation.py`). Units and number bases may be missing, but not be other ones (`units.py`, `plain.py`). `50\\%` is
0.5, and it is also 50, but `0.5\\%` is never 0.5.
"""

from collections.abc import Sequence

from luciola.verify import plain
from luciola.verify import pool as pools
from luciola.verify.extract import find
from luciola.verify.spelling import canonical
from luciola.verify.verdict import Verdict

__all__ = ["equal", "extract", "grade", "grade_many"]


def extract(completion: str) -> str | None:
    """The answer that the table above finds, or None."""
    return find(completion).answer


def grade(completion: str, truth: str, *, pool: pools.Pool | None = None) -> Verdict:
    """Whether the answer of `completion` equals `truth`. Never hangs, whatever the completion; reward 1.0 or 0.0.

    Args:
        completion: what the model wrote, of any length, tags included.
        truth: the reference answer, plain or LaTeX, without `\\boxed{}`.
        pool: where to compare by algebra; by default the workers shared by this process, with their limits.

    Raises:
        TypeError: when either is not a text.
        ValueError: when `truth` is blank.
    """
    for name, text in (("completion", completion), ("truth", truth)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a text (str), not {type(text).__name__}")
    return pools.grade_many([(completion, truth)], pool)[0]


def grade_many(pairs: Sequence[tuple[str, str]], *, pool: pools.Pool | None = None) -> list[Verdict]:
    """`grade` for every (completion, truth), side by side; verdicts in the order of the pairs."""
    return pools.grade_many(pairs, pool)


def equal(first: str, second: str, *, pool: pools.Pool | None = None) -> bool:
    """Whether either of two extracted answers would be right if the other one were the reference."""
    if not canonical(first) or not canonical(second):
        return first == second
    for given, asked in ((first, second), (second, first)):
        verdict = plain.compare(given, asked) or (pool or pools.shared()).check(given, asked)
        if verdict.kind != "correct":
            return False
    return True
