"""Learning rates at the corner points of each schedule."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.recipe import OptimSection
from luciola.train.schedule import learning_rate

SCHEDULES = st.sampled_from(["constant", "cosine", "linear", "multi-step", "wsd"])


def rate(step: int, steps: int, **section: object) -> float:
    return learning_rate(OptimSection.model_validate({"lr": 1.0} | section), step, steps)


def test_warm_up_rises_in_equal_steps_and_reaches_the_peak() -> None:
    rates = [rate(step, 100, warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("steps", [10, 100, 170, 1000, 106_450])
def test_multi_step_jumps_at_80_and_90_percent(steps: int) -> None:
    """DeepSeek LLM, section 2.3: 0.316 = sqrt(0.1) of the peak, then a tenth."""
    share = {"schedule": "multi-step", "final_lr_ratio": 0.1}
    second, third = steps * 8 // 10, steps * 9 // 10
    assert rate(second - 1, steps, **share) == 1.0
    assert rate(second, steps, **share) == pytest.approx(0.316, abs=3e-4)
    assert rate(third - 1, steps, **share) == pytest.approx(0.316, abs=3e-4)
    assert rate(third, steps, **share) == pytest.approx(0.1)
    assert rate(steps - 1, steps, **share) == pytest.approx(0.1)


def test_cosine_passes_its_middle_half_way_down() -> None:
    share = {"schedule": "cosine", "final_lr_ratio": 0.1, "warmup_steps": 20}
    assert rate(20, 120, **share) == 1.0
    assert rate(70, 120, **share) == pytest.approx(0.55)
    assert rate(120, 120, **share) == pytest.approx(0.1)


def test_linear_falls_evenly() -> None:
    rates = [rate(step, 10, schedule="linear", final_lr_ratio=0.0) for step in range(10)]
    assert rates == pytest.approx([1.0 - step / 10 for step in range(10)])


def test_wsd_is_stable_for_80_percent_and_then_falls_linearly() -> None:
    share = {"schedule": "wsd", "final_lr_ratio": 0.2}
    assert [rate(step, 100, **share) for step in (0, 79, 80)] == [1.0, 1.0, 1.0]
    assert rate(90, 100, **share) == pytest.approx(0.6)
    assert rate(100, 100, **share) == pytest.approx(0.2)


@given(SCHEDULES, st.integers(1, 500), st.integers(0, 50), st.floats(0, 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_schedule_leaves_its_bounds_or_rises_after_the_warm_up(
    schedule: str, steps: int, warmup: int, last: float
) -> None:
    section = {"schedule": schedule, "warmup_steps": warmup, "final_lr_ratio": last}
    rates = [rate(step, steps, **section) for step in range(steps)]
    assert all(0.0 <= r <= 1.0 for r in rates)
    after = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    assert all(r >= last - 1e-12 for r in after)
    assert len(set(after)) <= 1 or schedule != "constant"
