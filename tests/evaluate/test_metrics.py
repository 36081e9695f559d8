"""The estimators against their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.evaluate.metrics import maj_at_k, majority, pass_at_k, wilson_interval

counts = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(counts)
def test_pass_at_k_is_one_minus_the_share_of_all_wrong_choices(count: tuple[int, int, int]) -> None:
    n, c, k = count
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 1)])
def test_pass_at_k_counts_the_choices_with_a_right_sample(n: int, c: int, k: int) -> None:
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_stable_for_many_samples() -> None:
    assert pass_at_k(100_000, 1, 1000) == pytest.approx(0.01)
    assert pass_at_k(100_000, 50_000, 100) == pytest.approx(1.0, abs=1e-12)
    assert 0.0 <= pass_at_k(100_000, 99_999, 1) <= 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_majority() -> None:
    assert majority(["1", "2", "2"]) == 1
    assert majority(["1/2", "3", "0.5", "\\frac12", "3"]) == 0  # equal answers vote together
    assert majority(["3", "4", "4", "3"]) == 0  # a tie goes to the answer seen first
    assert majority([None, None, "3", None]) == 2  # no answer does not vote
    assert majority([None, None]) is None
    assert majority([]) is None
    assert majority(["a", "B", "b"], same=lambda x, y: x.lower() == y.lower()) == 1


def test_votes_are_equal_where_the_verifier_says_so() -> None:
    assert majority(["5 km", "5 m", "5 m", "5 m"]) == 1
    assert maj_at_k(["5 km", "5 m", "5 m", "5 m"], [True, False, False, False]) == 0.0
    assert majority(["3", "2,1", "1,2"]) == 1
    assert majority(["no", "yes", "Yes"]) == 1
    assert majority(["$5", "€5", "5 euros"]) == 1
    assert majority(["3", "x+1", "1+x"]) == 1  # by algebra
    assert majority(["6+9", "15", "15"]) == 1  # a calculation is none of its results
    assert majority(["$", "$", "3"]) == 0  # no answer that could be right


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=12))
def test_majority_is_the_most_frequent_and_the_first_of_equals(answers: list[str | None]) -> None:
    winner = majority(answers)
    voted = [answer for answer in answers if answer is not None]
    if winner is None:
        assert not voted
        return
    most = max(voted.count(answer) for answer in voted)
    assert answers.index(next(answer for answer in voted if voted.count(answer) == most)) == winner


def test_maj_at_k() -> None:
    answers = ["4", "5", "5", None]
    assert maj_at_k(answers, [False, True, True, False]) == 1.0
    assert maj_at_k(answers, [True, False, False, False]) == 0.0
    assert maj_at_k(answers, [True, False, False, False], k=2) == 1.0
    assert maj_at_k([None, None], [False, False]) == 0.0
    for wrong in ({"k": 0}, {"k": 5}):
        with pytest.raises(ValueError, match="maj@k needs"):
            maj_at_k(answers, [False] * 4, **wrong)
    with pytest.raises(ValueError, match="maj@k needs"):
        maj_at_k(answers, [False])


def test_wilson_interval_of_the_textbook() -> None:
    low, high = wilson_interval(15, 20)
    assert (low, high) == (pytest.approx(0.5313, abs=1e-4), pytest.approx(0.8881, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="an interval needs"):
        wilson_interval(3, 2)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_and_solves_its_equation(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1.0
    assert low < high
    for bound in (low, high):  # |rate - p| = z sqrt(p (1 - p) / n) at both ends
        distance = 1.959964 * math.sqrt(bound * (1 - bound) / trials)
        assert abs(successes / trials - bound) == pytest.approx(distance, abs=1e-7)
