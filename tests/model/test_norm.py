"""RMSNorm and its written-out gradient against autograd on the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.norm import RMSNorm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Statistics in float32; the weight is applied after casting back, as transformers does."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@given(
    st.lists(st.integers(1, 4), max_size=3), st.integers(1, 33), st.sampled_from([1e-6, 1e-2]),
    st.sampled_from([1e-3, 1.0, 1e3]), st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_value_and_gradients_are_those_of_the_formula(
    shape: list[int], width: int, eps: float, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, eps)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator))
    x = (size * torch.randn(*shape, width, generator=generator)).requires_grad_()
    ours, expected = norm(x), formula(x, norm.weight, eps)
    torch.testing.assert_close(ours, expected)
    g = torch.randn(ours.shape, generator=generator)
    (dx, dw), (dx2, dw2) = (torch.autograd.grad(y, (x, norm.weight), g) for y in (ours, expected))
    # Terms of size |g w| / rms cancel, all of them where the width is 1.
    rms = float((x.detach().square().mean(-1) + eps).sqrt().min())
    torch.testing.assert_close(dx, dx2, atol=1e-5 * float((g * norm.weight.detach()).abs().max()) / rms, rtol=0)
    torch.testing.assert_close(dw, dw2, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 8))
    assert bool(x.grad.isfinite().all())


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    """`y.sum().backward()` hands an expanded tensor of stride 0."""
    x = torch.randn(3, 5, 8, requires_grad=True)
    norm = RMSNorm(8)
    norm(x).sum().backward()
    expected = torch.autograd.grad(formula(x, norm.weight, 1e-6).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_bfloat16_keeps_its_dtype_and_is_right_to_its_rounding(size: float) -> None:
    x = (size * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    norm = RMSNorm(64).to(torch.bfloat16)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, formula(x, norm.weight, 1e-6))
    g = torch.randn(16, 64).bfloat16()
    (dx,) = torch.autograd.grad(y, x, g)
    x32 = x.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(formula(x32, norm.weight.float(), 1e-6), x32, g.float())
    assert float((dx.float() - exact).norm() / exact.norm()) < 0.01
