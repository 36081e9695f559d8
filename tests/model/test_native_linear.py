"""The kernel for a few rows against PyTorch's formula, and its promise: a row's result is its own, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.native import build
from luciola.model.native.linear import Product, formula, linear
from luciola.model.norm import RMSNorm

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 16), (7, 5), (8, 16), (9, 31), (33, 513), (100, 100), (64, 1040), (200, 576)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(y: Tensor, truth: Tensor, scale: Tensor) -> bool:
    """Within the rounding of a float32 sum whose terms add up to `scale` in magnitude."""
    return bool(((y - truth).abs() <= 1e-6 * scale + 1e-6).all())


def random_norm(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=seeded(3)))
    return norm.to(dtype)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def test_the_kernels_are_there() -> None:
    """The other tests would compare the formula with itself."""
    assert build.library() is not None, build.reason()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize("N", [0, 1, 2, 3, 4, 16, 33])
def test_products_are_those_of_the_formula(N: int, M: int, K: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(N, K, generator=seeded()), torch.randn(M, K, generator=seeded(1)).to(dtype)
    truth = (x.double() @ w.double().T).float()
    assert near(linear(x, w, exact=True), truth, x.abs() @ w.float().abs().T)
    assert near(linear(x, w), truth, x.abs() @ w.float().abs().T)


@pytest.mark.parametrize("dtype", DTYPES)
@given(N=st.integers(1, 40), M=st.integers(1, 40), K=st.integers(1, 1100), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_bias_residual_norm_and_swiglu(dtype: torch.dtype, N: int, M: int, K: int, seed: int) -> None:
    g = seeded(seed)
    w = torch.randn(M, K, generator=g).to(dtype)
    bias, residual = torch.randn(M, generator=g).to(dtype), torch.randn(N, M, generator=g)
    x, norm = 10 * torch.randn(N, 2 * K, generator=g), random_norm(K, dtype)
    for given_, options in ((x[:, :K], {"norm": norm}), (x, {"swiglu": True}), (x[:, :K], {})):
        y = linear(given_, w, bias, residual=residual, exact=True, **options)
        truth = formula(given_, w, bias, residual=residual, **options)
        fx = formula(given_, torch.eye(K), **options)
        assert near(y, truth, fx.abs() @ w.float().abs().T + bias.abs() + residual.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_wider_matrix(dtype: torch.dtype) -> None:
    """A slice of columns, whose rows lie further apart than they are long; what stands between them is never read."""
    wide = torch.full((20, 100), torch.nan, dtype=dtype)
    wide[:, 10:60] = torch.randn(20, 50, generator=seeded()).to(dtype)
    x = torch.randn(3, 50, generator=seeded(1))
    assert torch.equal(linear(x, wide[:, 10:60]), linear(x, wide[:, 10:60].contiguous()))


def test_bfloat16_inputs_are_cast_and_results_are_float32() -> None:
    x, w = torch.randn(3, 50, generator=seeded()).bfloat16(), torch.randn(20, 50, generator=seeded(1))
    y = linear(x, w, residual=torch.ones(3, 20).bfloat16())
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x.float(), w, residual=torch.ones(3, 20)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), [(13, 77), (576, 1536), (1500, 640)])
@pytest.mark.parametrize("kind", ["identity", "norm", "swiglu"])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(
    kind: str, M: int, K: int, dtype: torch.dtype, with_threads: Callable[[int], None]
) -> None:
    w, bias = torch.randn(M, K, generator=seeded()).to(dtype), torch.randn(M, generator=seeded(1))
    product = Product(w, bias, norm=random_norm(K, dtype) if kind == "norm" else None, swiglu=kind == "swiglu")
    x, residual = torch.randn(40, product.width, generator=seeded(2)), torch.randn(40, M, generator=seeded(3))
    with_threads(1)
    alone = torch.cat([product(x[i : i + 1], residual[i : i + 1]) for i in range(40)])
    for threads in (1, 2):
        with_threads(threads)
        for N in range(1, 41):
            assert torch.equal(product(x[40 - N :], residual[40 - N :], exact=True), alone[40 - N :]), (threads, N)


@pytest.fixture
def with_threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_what_is_not_finite_stays_so(value: float, place: str) -> None:
    """It is how damaged weights are noticed."""
    x, w = torch.ones(5, 35), torch.ones(9, 35)
    (x if place == "x" else w)[4, 34] = value
    y = linear(x, w)
    assert (~y.isfinite()).sum() == (9 if place == "x" else 5)
    assert not linear(x, w, norm=RMSNorm(35))[4, 4].isfinite()


@pytest.mark.parametrize("extreme", [-1e4, -90.0, 90.0, 1e4])
def test_swiglu_at_the_ends_of_the_exponential(extreme: float) -> None:
    x = torch.tensor([[extreme, 2.0]])
    assert linear(x, torch.ones(1, 1), swiglu=True).item() == pytest.approx(2 * max(extreme, 0.0), abs=1e-30)


def test_weights_changed_in_place_are_seen() -> None:
    w, norm = torch.randn(8, 32, generator=seeded()), random_norm(32, torch.float32)
    product = Product(w, norm=norm)
    w.mul_(2)
    norm.weight.add_(1)
    x = torch.randn(2, 32, generator=seeded(1))
    assert torch.equal(product(x), Product(w.clone(), norm=norm)(x))


def test_gradients_flow_where_they_are_recorded() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x, w = torch.randn(3, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
        linear(x, w).square().sum().backward()
        assert x.grad is not None
        assert w.grad is not None


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: linear(torch.ones(2, 5), torch.ones(3, 4)), "x has 5 columns"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), swiglu=True), "x has 4 columns where this product takes 8"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), "bias has shape"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), residual=torch.ones(3, 2)), "residual has shape"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), norm=RMSNorm(5)), "norm has width 5"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), norm=RMSNorm(4), swiglu=True), "give one of them"),
        (lambda: linear(torch.ones(2, 4), torch.ones(4, 3).T), "must be contiguous"),
        (lambda: linear(torch.ones(2, 4), torch.ones(4)), "must be a matrix"),
    ],
)
def test_misfits_are_named(call: Callable[[], Tensor], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        call()


def test_without_a_compiler_the_formula_serves() -> None:
    program = """
import torch
from luciola.model.native import build
from luciola.model.native.linear import formula, linear
from luciola.model.quant import quantize
assert build.library() is None and "LUCIOLA_NATIVE" in build.reason()
x, w = torch.ones(2, 6), torch.randn(3, 3)
assert torch.equal(linear(x, w, swiglu=True), formula(x, w, swiglu=True))
for bits in (4, 8):
    q = quantize(w, bits)
    assert torch.allclose(linear(x, q, swiglu=True, exact=True), formula(x, q.dequantize(), swiglu=True))
"""
    environment = {**os.environ, "LUCIOLA_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
