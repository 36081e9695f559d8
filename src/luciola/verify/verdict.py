"""What a verifier says about a completion."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["correct", "wrong", "no_answer", "timeout", "crash"]
KINDS: tuple[Kind, ...] = get_args(Kind)
VERIFIER_FAILED: tuple[Kind, ...] = ("timeout", "crash")  # such a verdict says nothing about the answer


@dataclass(frozen=True, slots=True)
class Verdict:
    """One outcome with its reward. `detail` is a short reason for people who read samples; nothing depends on it.

    | kind      | what it says                                                                                |
    | --------- | ------------------------------------------------------------------------------------------- |
    | correct   | the answer equals the reference                                                             |
    | wrong     | there is an answer, and it does not                                                         |
    | no_answer | no answer in an accepted form, several that disagree, or one that cannot be read            |
    | timeout   | the verifier was still running at its time limit and was killed                             |
    | crash     | the verifier died: it says nothing about the completion                                     |

    Only "correct" earns a reward. The last two are apart from "wrong" so that a run can count them, and can leave such
    samples out of their group instead of punishing them.
    """

    kind: Kind
    reward: float
    detail: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:  # one of one's own making would be counted nowhere
            raise ValueError(f"a Verdict is of a kind out of {', '.join(KINDS)}, got {self.kind!r}")


def correct() -> Verdict:
    return Verdict("correct", 1.0)


def wrong(detail: str = "") -> Verdict:
    return Verdict("wrong", 0.0, detail)


def no_answer(detail: str) -> Verdict:
    return Verdict("no_answer", 0.0, detail)
