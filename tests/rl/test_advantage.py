"""Group advantages by hand, and samples whose reward nobody knows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.recipe.objective import Advantage
from luciola.rl.advantage import EPS, group_advantages, spread, teaching

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True)
REWARDS = st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=33)


def advantages(rewards: list[float], known: list[bool] | None = None, scale: bool = True) -> list[float]:
    mask = torch.tensor([known or [True] * len(rewards)])
    return group_advantages(torch.tensor([rewards]), mask, scale=scale)[0].tolist()


def test_the_deviation_is_that_of_a_sample() -> None:
    """Rewards 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, so the deviation is 1/2 (with G: 0.433)."""
    expected = [0.75 / (0.5 + EPS)] + [-0.25 / (0.5 + EPS)] * 3
    assert advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx(expected)
    assert advantages([1.0, 0.0, 0.0, 0.0], scale=False) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_unknown_rewards_neither_learn_nor_count() -> None:
    """The first four as above, whatever stands in the fifth place."""
    for rubbish in (0.0, 7.0):
        found = advantages([1.0, 0.0, rubbish, 0.0, 0.0], [True, True, False, True, True])
        assert found == pytest.approx([1.4997, -0.4999, 0.0, -0.4999, -0.4999], abs=1e-4)


def test_a_group_with_one_known_reward_has_nothing_to_compare() -> None:
    assert advantages([1.0, 0.0, 0.0], [True, False, False]) == [0.0, 0.0, 0.0]
    assert advantages([1.0, 0.0, 0.0], [False, False, False]) == [0.0, 0.0, 0.0]


@given(st.floats(0, 10, width=32), st.integers(2, 64), st.booleans())
@SETTINGS
def test_equal_rewards_give_exactly_nothing(reward: float, size: int, scale: bool) -> None:
    """To the last bit: a mean that rounding moved would be divided by a deviation as small."""
    assert advantages([reward] * size, scale=scale) == [0.0] * size


@given(REWARDS)
@SETTINGS
def test_advantages_sum_to_zero_and_follow_the_rewards(rewards: list[float]) -> None:
    found = advantages(rewards)
    assert sum(found) == pytest.approx(0.0, abs=1e-4)
    for (a, r), (b, s) in zip(
        zip(found, rewards, strict=True), list(zip(found, rewards, strict=True))[1:], strict=False
    ):
        assert (a > b) == (r > s)
    expected = torch.tensor(rewards).double()
    expected = (expected - expected.mean()) / (expected.std() + EPS)
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 0.1]])
    found = group_advantages(rewards, torch.ones(3, 2, dtype=torch.bool))
    for row, reward in zip(found.tolist(), rewards.tolist(), strict=True):
        assert row == pytest.approx(advantages(reward))


def test_spread_asks_for_a_difference_among_the_known() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    known = torch.tensor([[True] * 3, [True, False, True], [True] * 3, [False] * 3])
    assert spread(rewards, known).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", [False, False, True, False, True]),
        ("correct", [True, False, True, False, False]),
        ("pairs", [False, False, True, False, False]),
        ("critic", [True, True, True, False, True]),
        ("global", [True, True, True, False, True]),
    ],
)
def test_what_a_group_must_have_to_teach_depends_on_the_advantage(kind: Advantage, expected: list[bool]) -> None:
    """Groups: all right, all wrong, one of each, one of each that is not known, both wrong but one well formed."""
    correct = torch.tensor([[True, True], [False, False], [True, False], [True, False], [False, False]])
    known = torch.ones(5, 2, dtype=torch.bool)
    known[3] = False
    rewards = correct.float()
    rewards[4, 0] = 0.1
    assert teaching(kind, rewards, known, correct).tolist() == expected
    if kind == "global":
        assert teaching(kind, rewards[:1], known[:1], correct[:1]).tolist() == [False]  # nor does the rollout differ
