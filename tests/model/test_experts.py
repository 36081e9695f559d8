"""The grouped experts against a plain loop over tokens, and their written-out gradients against numerical ones."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.experts import Experts

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)


def loop(experts: Experts, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
    rows = []
    for x, weights, indices in zip(x_ND, weights_NK, indices_NK.tolist(), strict=True):
        y = torch.zeros_like(x)
        for weight, expert in zip(weights, indices, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            y = y + weight * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def case(
    N: int, E: int, K: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Experts, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(E, 4, 3).to(dtype)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x = torch.randn(N, 4, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(N, K, generator=generator).to(dtype).requires_grad_()
    indices = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(N)])
    return experts, x, weights, indices


@given(st.integers(1, 12), st.integers(1, 9), st.data(), st.integers(0, 999))
@SETTINGS
def test_grouped_experts_equal_a_loop_over_tokens(N: int, E: int, data: st.DataObject, seed: int) -> None:
    """Forward and all four gradients; with few tokens and many experts most experts stay empty."""
    experts, x, weights, indices = case(N, E, data.draw(st.integers(1, E)), seed)
    ours, expected = experts(x, weights, indices), loop(experts, x, weights, indices)
    torch.testing.assert_close(ours, expected)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed), dtype=ours.dtype)
    inputs = (x, weights, experts.gate_up_proj, experts.down_proj)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("N", "E", "K"), [(5, 3, 2), (2, 6, 1), (3, 1, 1), (1, 4, 4)])
def test_gradients_are_the_numerical_ones(N: int, E: int, K: int) -> None:
    experts, x, weights, indices = case(N, E, K, seed=0)

    def function(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"gate_up_proj": gate_up, "down_proj": down}, (x, weights, indices))

    assert torch.autograd.gradcheck(function, (x, weights, experts.gate_up_proj, experts.down_proj))


def test_an_expert_without_tokens_has_gradient_zero_not_garbage() -> None:
    experts, x, weights, _ = case(6, 4, 1, seed=0)
    experts(x, weights, torch.full((6, 1), 2)).sum().backward()
    for p in experts.parameters():
        assert p.grad is not None
        busy = p.grad.flatten(1).abs().sum(1) > 0
        assert busy.tolist() == [False, False, True, False]


def test_the_order_of_a_tokens_experts_does_not_matter() -> None:
    experts, x, weights, indices = case(7, 5, 3, seed=0)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(experts(x, weights[:, order], indices[:, order]), experts(x, weights, indices))


def test_bfloat16_differs_by_its_rounding_only() -> None:
    experts, x, weights, indices = case(200, 4, 2, seed=0, dtype=torch.float32)
    exact = experts(x, weights, indices)
    gradients = torch.autograd.grad(exact.sum(), (weights, experts.down_proj))
    experts.to(torch.bfloat16)
    rounded = experts(x.bfloat16(), weights, indices)  # the gate's weights stay float32
    found = torch.autograd.grad(rounded.sum(), (weights, experts.down_proj))
    assert [t.dtype for t in (rounded, *found)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for ours, theirs in zip((rounded, *found), (exact, *gradients), strict=True):
        assert float((ours.float() - theirs).detach().norm() / theirs.detach().norm()) < 0.02
