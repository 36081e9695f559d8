"""The GRPO objective by hand: gradients on and off policy, the four clip branches, the KL term, the denominators."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.recipe.objective import ObjectiveSection
from luciola.rl.objective import Loss, Tokens, kl_estimate, policy_loss, token_weights

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}


def grpo_loss(
    logp: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, reference_logp_N: Tensor | None = None, **parts: Any
) -> Loss:
    """The loss of tokens that are a sequence each."""
    sequence = torch.arange(len(logp))
    tokens = Tokens(logp, old, old, advantages, weights, sequence, reference_logp_N)
    return policy_loss(tokens, ObjectiveSection(**parts))


def loss_of(ratio: list[float], advantages: list[float], **more: Any) -> tuple[Loss, Tensor]:
    """The loss of tokens with these pi / pi_old, each of weight 1, and its gradient in log pi."""
    old = torch.linspace(-3.0, -0.5, len(ratio))
    logp = (old + torch.tensor(ratio).log()).requires_grad_()
    loss = grpo_loss(logp, old, torch.tensor(advantages), torch.ones(len(ratio)), **(CLIP | more))
    return loss, torch.autograd.grad(loss.loss, logp)[0]


@pytest.mark.parametrize(
    ("aggregation", "c"), [("sequence", [1 / (3 * 2), 1 / (3 * 3), 1 / (3 * 1)]), ("token", [1 / 6] * 3)]
)
def test_on_policy_the_gradient_is_c_times_advantage(aggregation: Any, c: list[float]) -> None:
    """d J / d log pi = c A with c = 1 / (G |o|) for the mean over sequences and 1 / sum |o| for the token mean."""
    lengths, advantages = torch.tensor([2, 3, 1]), [0.7, -1.2, 0.4]
    weights = token_weights(lengths, aggregation, torch.ones(3, dtype=torch.bool))
    assert weights.tolist() == pytest.approx(c)
    logp = torch.tensor([-1.0, -2.0, -0.3, -0.1, -4.0, -2.5], requires_grad=True)
    sequence = torch.tensor([0, 0, 1, 1, 1, 2])
    loss = grpo_loss(logp, logp.detach(), torch.tensor(advantages)[sequence], weights[sequence], **CLIP)
    (gradient,) = torch.autograd.grad(loss.loss, logp)
    expected = [-c[i] * advantages[i] for i in sequence.tolist()]
    assert gradient.tolist() == pytest.approx(expected)
    assert float(loss.clipped) == 0


def test_sequences_without_a_verdict_neither_weigh_nor_count() -> None:
    lengths, known = torch.tensor([2, 100, 4]), torch.tensor([True, False, True])
    assert token_weights(lengths, "sequence", known).tolist() == pytest.approx([1 / 4, 0, 1 / 8])
    assert token_weights(lengths, "token", known).tolist() == pytest.approx([1 / 6, 0, 1 / 6])
    nobody = torch.zeros(3, dtype=torch.bool)
    for aggregation in ("sequence", "token"):
        assert token_weights(lengths, aggregation, nobody).tolist() == [0, 0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "moves"),
    [
        (1.5, 2.0, 1.28 * 2.0, False),  # better and already more likely: cut above
        (0.5, 2.0, 0.5 * 2.0, True),  # better but less likely: pulled back however far away
        (1.5, -2.0, 1.5 * -2.0, True),  # worse but more likely: pushed back however far away
        (0.5, -2.0, 0.8 * -2.0, False),  # worse and already less likely: cut below
        (1.1, 2.0, 1.1 * 2.0, True),
        (0.9, -2.0, 0.9 * -2.0, True),
    ],
)
def test_the_branches_of_the_clip(ratio: float, advantage: float, value: float, moves: bool) -> None:
    loss, gradient = loss_of([ratio], [advantage])
    assert float(loss.loss.detach()) == pytest.approx(-value, rel=1e-5)
    assert gradient.tolist() == pytest.approx([-ratio * advantage if moves else 0.0], rel=1e-5)
    assert float(loss.clipped) == (0 if moves else 1)


@given(
    st.lists(st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-2, 2)), min_size=1, max_size=9), st.floats(0, 1)
)
@SETTINGS
def test_the_gradient_coefficient_of_the_unified_view(tokens: list[tuple[float, float, float]], beta: float) -> None:
    """DeepSeekMath, section 5.1: GC = A + beta (pi_ref / pi - 1), where pi_old = pi."""
    logp, reference, advantages = (torch.tensor(x, dtype=torch.float64) for x in zip(*tokens, strict=True))
    logp.requires_grad_()
    weights = torch.full_like(advantages, 0.25)
    loss = grpo_loss(logp, logp.detach(), advantages, weights, **CLIP, beta=beta, reference_logp_N=reference)
    (gradient,) = torch.autograd.grad(loss.loss, logp)
    coefficient = advantages + beta * ((reference - logp.detach()).exp() - 1)
    torch.testing.assert_close(gradient, -0.25 * coefficient)


@given(st.lists(st.floats(-30, 0), min_size=2, max_size=8), st.lists(st.floats(-30, 0), min_size=2, max_size=8))
@SETTINGS
def test_the_kl_estimate_is_never_negative(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    assert float(kl_estimate(torch.tensor(a[:n]), torch.tensor(b[:n])).min()) >= 0.0
    assert kl_estimate(torch.tensor(a), torch.tensor(a)).tolist() == [0.0] * len(a)


@given(st.integers(2, 12), st.integers(0, 999))
@SETTINGS
def test_the_kl_estimate_is_unbiased(V: int, seed: int) -> None:
    """Its mean over tokens drawn from pi is KL(pi || reference): here the exact mean over a small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logp, reference = (torch.randn(V, generator=generator).double().log_softmax(-1) for _ in range(2))
    mean = (logp.exp() * kl_estimate(logp, reference)).sum()
    kl = (logp.exp() * (logp - reference)).sum()
    assert float(mean) == pytest.approx(float(kl), abs=1e-10)


def test_the_kl_of_nearly_equal_policies_is_resolved() -> None:
    """d = 1e-4 in float32: d^2 / 2 = 5e-9 would vanish in exp(d) - d - 1."""
    assert float(kl_estimate(torch.tensor(-1.0), torch.tensor(-1.0 + 1e-4))) == pytest.approx(5e-9, rel=2e-2)


def test_huge_ratios_stay_finite() -> None:
    """A token 1000 nats away: the loss is finite, and the clamp stops its gradient."""
    logp = torch.tensor([-1000.0, 0.0, -1000.0, 0.0], requires_grad=True)
    old = torch.tensor([0.0, -1000.0, 0.0, -1000.0])
    loss = grpo_loss(
        logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4), **CLIP, beta=0.1, reference_logp_N=old
    )
    (gradient,) = torch.autograd.grad(loss.loss, logp)
    assert math.isfinite(float(loss.loss.detach()))
    assert bool(gradient.isfinite().all())


def test_without_beta_no_reference_is_asked() -> None:
    loss, _ = loss_of([1.0], [1.0])
    assert float(loss.kl) == 0.0


def test_sums_for_the_log_count_tokens() -> None:
    loss, _ = loss_of([1.5, 0.5, 1.0, 2.0], [1.0, -1.0, 1.0, -1.0])
    assert float(loss.clipped) == 2
