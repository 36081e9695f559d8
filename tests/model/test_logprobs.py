"""Token log-probabilities against log_softmax of all logits: values, gradients, entropy; softmax kept or recomputed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model import logprobs
from luciola.model.logprobs import token_logprobs, token_logprobs_and_entropy

TEMPERATURES = st.sampled_from([1.0, 0.6, 1.7])


@pytest.fixture(params=["kept", "recomputed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of a few rows, and a softmax that is either kept for the backward pass or computed again."""
    monkeypatch.setattr(logprobs, "CHUNK_NUMBERS", 40)
    monkeypatch.setattr(logprobs, "KEPT_NUMBERS", 10**9 if request.param == "kept" else 0)
    return str(request.param)


def case(N: int, V: int, seed: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = (size * torch.randn(N, 6, generator=generator)).requires_grad_()
    W = torch.randn(V, 6, generator=generator, requires_grad=True)
    return h, W, torch.randint(0, V, (N,), generator=generator)


def expected(h: Tensor, W: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return (h @ W.T / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def test_values_gradients_and_entropy(path: str) -> None:
    @given(st.integers(0, 20), st.integers(1, 50), TEMPERATURES, st.integers(0, 999))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(N: int, V: int, temperature: float, seed: int) -> None:
        h, W, targets = case(N, V, seed)
        logp, entropy = token_logprobs_and_entropy(h, W, targets, temperature)
        torch.testing.assert_close(logp, expected(h, W, targets, temperature), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logp, token_logprobs(h, W, targets, temperature))
        p = (h @ W.T / temperature).softmax(-1)
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).detach(), atol=1e-5, rtol=1e-5)
        assert not entropy.requires_grad
        g = torch.randn(N, generator=torch.Generator().manual_seed(seed))
        ours = torch.autograd.grad(logp, (h, W), g)
        theirs = torch.autograd.grad(expected(h, W, targets, temperature), (h, W), g)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    check()


def test_impossible_tokens_have_a_finite_log_probability(path: str) -> None:
    """exp underflows where the difference of logits does not."""
    h, W, targets = case(8, 11, seed=0, size=300.0)
    logp = token_logprobs(h, W, targets)
    assert float(logp.detach().min()) < -500
    torch.testing.assert_close(logp, expected(h, W, targets, 1.0))
    logp.sum().backward()
    assert bool(h.grad.isfinite().all())


@pytest.mark.parametrize("frozen", ["h", "W"])
def test_a_frozen_side_gets_no_gradient(path: str, frozen: str) -> None:
    h, W, targets = case(7, 13, seed=0)
    (h if frozen == "h" else W).requires_grad_(False)
    token_logprobs(h, W, targets).sum().backward()
    assert (h.grad is None) == (frozen == "h")
    assert (W.grad is None) == (frozen == "W")


def test_bfloat16_differs_by_its_rounding_only(path: str) -> None:
    """Logits are rounded to bfloat16, everything after them is float32, and the head's gradient sums many chunks."""
    h, W, targets = case(600, 31, seed=0)
    exact = expected(h, W, targets, 1.0)
    exact_h, exact_W = torch.autograd.grad(exact.sum(), (h, W))
    h16, W16 = (x.detach().bfloat16().requires_grad_() for x in (h, W))
    logp = token_logprobs(h16, W16, targets)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, exact, atol=0.1, rtol=0.02)
    grad_h, grad_W = torch.autograd.grad(logp.sum(), (h16, W16))
    assert grad_h.dtype == grad_W.dtype == torch.bfloat16
    assert float((grad_h.float() - exact_h).norm() / exact_h.norm()) < 0.02
    assert float((grad_W.float() - exact_W).norm() / exact_W.norm()) < 0.02


def test_a_second_backward_pass_is_refused_rather_than_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept softmax is overwritten by its gradient."""
    h, W, targets = case(7, 13, seed=0)
    total = token_logprobs(h, W, targets).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
