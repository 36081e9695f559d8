"""What a reward function may return."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from luciola.verify.reward_function import Unusable, call, load
from luciola.verify.verdict import Verdict


@pytest.mark.parametrize(
    "said",
    [
        0.5, Fraction(1, 2), np.float16(0.5), np.float32(0.5), np.longdouble(0.5), np.array(0.5),
        torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
        Verdict("correct", np.float32(0.5)),
    ],
)  # fmt: skip
def test_any_real_number_is_a_reward(said: Any) -> None:
    verdict = call(lambda *_: said, "", "", "")
    assert verdict == Verdict("correct", 0.5) and type(verdict.reward) is float


@pytest.mark.parametrize("said", [1, True, np.True_, np.int8(1), torch.tensor(True)])
def test_whole_numbers_and_truth_values_are_too(said: Any) -> None:
    assert call(lambda *_: said, "", "", "") == Verdict("correct", 1.0)


@pytest.mark.parametrize(
    "said",
    [
        "1", b"1", np.str_("1"), np.array("1"), None, 1j, [1.0], np.ones(1), torch.ones(1), float("nan"),
        np.float32("inf"), torch.tensor(float("nan")), Verdict("correct", float("nan")),
    ],
)  # fmt: skip
def test_anything_else_is_refused(said: Any) -> None:
    with pytest.raises(Unusable, match=r"expected a finite real number \(.*numpy scalar.*\) or a Verdict, got "):
        call(lambda *_: said, "", "", "")


def test_a_verdict_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="a kind out of correct, wrong, no_answer, timeout, crash, got 'great'"):
        Verdict("great", 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["./cr.py:one", "cr.py:one", "rewards/cr:one", "..cr:one", "my-rewards:one"])
def test_a_file_is_named_without_its_folder_and_ending(name: str) -> None:
    with pytest.raises(Unusable, match=r"a file by its name without \.py: my_rewards:accuracy"):
        load(name)
