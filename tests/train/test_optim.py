"""AdamW by hand, clipping, which weights decay, and float32 masters of a bfloat16 model."""

from typing import Any

import pytest
import torch
from torch import nn

from luciola.recipe import OptimSection
from luciola.train.optim import Optimizer


def section(**changes: Any) -> OptimSection:
    return OptimSection.model_validate({"lr": 0.1, "clip_grad_norm": 0, "weight_decay": 0.0} | changes)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((2, 3), 2.0, dtype=dtype))
        self.experts = nn.Parameter(torch.full((2, 2, 2), 2.0, dtype=dtype))
        self.norm = nn.Parameter(torch.full((3,), 2.0, dtype=dtype))


def give(model: nn.Module, value: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


def step(optimizer: Optimizer, lr: float = 0.1) -> float:
    optimizer.accumulate()
    return optimizer.step(lr)


def test_two_steps_are_those_of_the_paper() -> None:
    """m = 0.1 g, then 0.9 m + 0.1 g'; v likewise with 0.95; both divided by 1 - beta^t."""
    model = Model()
    optimizer = Optimizer(model, section(betas=(0.9, 0.95), eps=1e-8))
    give(model, 3.0)
    step(optimizer)
    assert model.norm.tolist() == pytest.approx([1.9] * 3)  # the first step of Adam has size lr
    give(model, -1.0)
    step(optimizer, lr=0.01)
    m = (0.9 * 0.1 * 3.0 + 0.1 * -1.0) / (1 - 0.9**2)
    v = (0.95 * 0.05 * 9.0 + 0.05 * 1.0) / (1 - 0.95**2)
    assert model.norm.tolist() == pytest.approx([1.9 - 0.01 * m / v**0.5] * 3, rel=1e-5)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Model()
    optimizer = Optimizer(model, section(weight_decay=0.5))
    give(model, 0.0)
    step(optimizer)
    assert model.matrix[0, 0].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))
    assert model.experts[0, 0, 0].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))
    assert model.norm.tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_global_and_clipping_scales_everything(dtype: torch.dtype) -> None:
    """17 gradients of 2 have norm 2 sqrt(17). Adam hides a scale, so the second moment is looked at."""
    model = Model(dtype)
    optimizer = Optimizer(model, section(clip_grad_norm=1.0))
    give(model, 2.0)
    norm = step(optimizer)
    assert norm == pytest.approx(2 * 17**0.5)
    v = optimizer.state()["exp_avg_sq.norm"]
    assert v.tolist() == pytest.approx([0.05 * (2.0 / norm) ** 2] * 3, rel=1e-5)


def test_a_norm_below_the_limit_is_left_alone() -> None:
    model = Model()
    optimizer = Optimizer(model, section(clip_grad_norm=100.0))
    give(model, 2.0)
    step(optimizer)
    assert optimizer.state()["exp_avg.norm"].tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad: float) -> None:
    model = Model()
    optimizer = Optimizer(model, section())
    give(model, 1.0)
    model.matrix.grad[0, 0] = bad
    assert not step(optimizer) < float("inf")
    assert all(bool((p == 2.0).all()) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    give(model, 3.0)
    step(optimizer)
    assert model.norm.tolist() == pytest.approx([1.9] * 3)  # as if the bad step had not been


def test_parameters_without_gradient_stay_as_they_are() -> None:
    model = Model()
    optimizer = Optimizer(model, section(weight_decay=0.5))
    model.norm.grad = torch.ones(3)
    step(optimizer)
    assert bool((model.matrix == 2.0).all())
    assert model.norm.tolist() == pytest.approx([1.9] * 3)


def test_bfloat16_does_not_lose_small_updates() -> None:
    """Steps of 0.001 at 2.0, where bfloat16's next number is 2.0156: a hundred of them arrive, each alone would not."""
    model = Model(torch.bfloat16)
    optimizer = Optimizer(model, section())
    for _ in range(100):
        give(model, -1.0)
        step(optimizer, lr=0.001)
    assert model.norm.dtype == torch.bfloat16
    assert optimizer.masters["norm"].dtype == torch.float32
    assert optimizer.masters["norm"].tolist() == pytest.approx([2.1] * 3, rel=1e-5)
    assert model.norm.float().tolist() == pytest.approx([2.1] * 3, abs=0.0079)


def test_bfloat16_gradients_of_many_batches_are_added_in_float32() -> None:
    """1 + 256 * 2^-8 = 2; added one after the other in bfloat16 it would stay 1."""
    model = Model(torch.bfloat16)
    optimizer = Optimizer(model, section())
    for value in [1.0] + [2.0**-8] * 256:
        give(model, value)
        optimizer.accumulate()
        assert model.norm.grad is None
    optimizer.step(0.1)
    assert optimizer.state()["exp_avg.norm"].tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restored_into_a_fresh_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def gradients(model: nn.Module, i: int) -> None:
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)

    model = Model(dtype)
    optimizer = Optimizer(model, section(weight_decay=0.1, clip_grad_norm=1.0))
    for i in range(3):
        gradients(model, i)
        step(optimizer)
    kept = {name: tensor.clone() for name, tensor in optimizer.state().items()}

    other = Model(dtype)
    again = Optimizer(other, section(weight_decay=0.1, clip_grad_norm=1.0))
    again.restore(kept)
    for i in range(3, 6):
        for m, o in ((model, optimizer), (other, again)):
            gradients(m, i)
            step(o)
    for name, tensor in optimizer.state().items():
        assert torch.equal(again.state()[name], tensor), name
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
