"""Norm, gate and rotation by the kernels are their formulas in float64, gradients included, whatever the threads."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.model.mlp import SwiGLU
from luciola.model.native import pointwise
from luciola.model.native.repeat import usable
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rotation, rotate, turn

pytestmark = pytest.mark.skipif(not usable(torch.zeros(1)), reason="there are no native kernels here")
SHAPES = [(1, 1), (3, 5), (2, 7, 16), (130, 24), (65, 352), (2, 300, 128)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agree(ours: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = ours(*inputs), formula(*wide)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(found, inputs, g)
    for a, b in zip(gradients, torch.autograd.grad(expected, wide, g.double()), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], eps=1e-3)
    agree(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, x),
        lambda x, w: w * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt(),
        random(*shape),
        random(shape[-1], seed=1),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate(shape: tuple[int, ...]) -> None:
    agree(pointwise.swiglu, lambda gate, up: F.silu(gate) * up, random(*shape), random(*shape, seed=1))


def test_the_gate_far_from_zero() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30], requires_grad=True)
    agree(pointwise.swiglu, lambda gate, up: F.silu(gate) * up, gate, torch.ones(9, requires_grad=True))


@pytest.mark.parametrize("rows", ["shared angles", "angles of each row", "one row's angles"])
def test_the_rotation_and_back(rows: str) -> None:
    """Where time does not lie densely, as heads of a projection do not."""
    x_BHTd = random(2, 9, 3, 10).transpose(1, 2)
    angles = random(2, 9, 5, seed=1).detach()
    angles = {"shared angles": angles[0], "angles of each row": angles, "one row's angles": angles[:1]}[rows]
    rotation = Rotation(angles.cos(), angles.sin())

    def formula(x: Tensor) -> Tensor:
        cos, sin = (y.double() if y.ndim == 2 else y.double().unsqueeze(1) for y in rotation)
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    agree(lambda x: rotate(x, rotation, False), formula, x_BHTd)
    there_and_back = turn(turn(x_BHTd.detach(), rotation, False), rotation, False, back=True)
    torch.testing.assert_close(there_and_back, x_BHTd.detach())


def test_angles_that_do_not_fit_are_refused() -> None:
    x, cos = torch.randn(2, 3, 9, 10), torch.ones(8, 5)
    with pytest.raises(ValueError, match="do not fit"):
        pointwise.turn(x, cos, cos)


def test_no_bit_depends_on_threads() -> None:
    norm, before, found = RMSNorm(96), torch.get_num_threads(), []
    x = random(700, 96)
    h = random(700, 200, seed=2)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, a = norm(x), pointwise.swiglu(h, h)
            found.append([y, a, *torch.autograd.grad(y.sum(), [x, norm.weight]), *torch.autograd.grad(a.sum(), [h])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_modules_go_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    run = pointwise._run
    monkeypatch.setattr(pointwise, "_run", lambda name, arguments: called.append(name) or run(name, arguments))
    x = random(4, 8)
    SwiGLU(8, 16)(RMSNorm(8)(x)).sum().backward()
    rotate(random(1, 2, 4, 8), Rotation(torch.ones(4, 4), torch.zeros(4, 4)), False)
    assert called == [
        "luciola_rms_norm",
        "luciola_swiglu",
        "luciola_swiglu_gradients",
        "luciola_rms_norm_gradients",
        "luciola_turn",
    ]
    called.clear()
    with torch.no_grad():
        RMSNorm(8).double()(x.double())
        SwiGLU(8, 16).bfloat16()(x.bfloat16())
    assert not called
