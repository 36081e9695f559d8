"""y = W f(x) for the few rows of a decoding step: W float32, bfloat16 or quantised, f an RMSNorm or SwiGLU's product.

The C kernel (linear.c) reads W once, at the speed of memory, and computes each row alike: **a row's result does not
depend on the other rows, bit for bit**, nor on the number of threads. PyTorch's products are faster from some dozens of
rows on, and choose their order of summation by the number of rows; `exact` keeps to the kernel whatever the number.

Activations are float32 throughout, weights are used as they are.

Shapes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.model.native.repeat import kernel
from luciola.model.norm import RMSNorm

if TYPE_CHECKING:
    from luciola.model.quant import Quantized

# From so many rows on PyTorch's product is faster (one AVX-512 core); what is not float32 has to be converted for it.
GEMM_ROWS = {torch.float32: 40, torch.bfloat16: 80, torch.int8: 128, torch.uint8: 192}
DEQUANTISED = 1 << 20  # numbers of a quantised matrix that are float32 at once
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
_IDENTITY, _NORM, _NORM_BFLOAT16, _SWIGLU = range(4)


class _Matrix(ctypes.Structure):
    """`Matrix` of linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scales", "minima", "bias", "norm")),
        *((name, ctypes.c_ssize_t) for name in ("M", "K", "stride", "groups")),
        *((name, ctypes.c_int32) for name in ("kind", "shift", "f")),
        ("eps", ctypes.c_float),
    )


class _Call(ctypes.Structure):
    """What `luciola_linear` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "x", "residual", "w")),
        *((name, ctypes.c_ssize_t) for name in ("N", "x_stride")),
    )


def formula(
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """What `linear` computes, in PyTorch. x: (..., K), or (..., 2K) for SwiGLU; returns (..., M) float32."""
    x = x.float()
    if norm is not None:
        x = norm(x)
    if swiglu:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    if isinstance(weight, Tensor):
        y = F.linear(x, weight.float())
    else:
        M, K = weight.shape
        step = max(1, DEQUANTISED // K)
        parts = (weight.rows(start, min(M, start + step)).dequantize() for start in range(0, M, step))
        y = torch.cat([F.linear(x, part) for part in parts], dim=-1)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual


class Product:
    """y = W f(x) + bias + residual with all but x and residual prepared: a call costs about two microseconds.

    It goes on using the memory that `weight`, `bias` and `norm` have now: updates in place are seen, except of a bias
    that is not float32; a parameter that is moved or cast needs a new Product. Weights get no gradients.

    Args:
        weight: (M, K) with contiguous rows (the distance of rows may exceed K), or Quantized.
        bias: (M), of any float dtype.
        norm: f is this RMSNorm.
        swiglu: f is silu(x[:, :K]) * x[:, K:], and x has width 2K.

    Raises:
        ValueError: weight is not a matrix with contiguous rows, another shape does not fit, or norm and swiglu are
            given both.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
        *,
        norm: RMSNorm | None = None,
        swiglu: bool = False,
    ) -> None:
        if len(weight.shape) != 2:
            raise ValueError(f"weight must be a matrix (M, K), not of shape {tuple(weight.shape)}")
        self.M, self.K = M, K = weight.shape
        if norm is not None and swiglu:
            raise ValueError("norm and swiglu are two choices of f; give one of them")
        if norm is not None and norm.weight.shape != (K,):
            raise ValueError(f"norm has width {len(norm.weight)} where weight has {K} columns; they must be equal")
        if bias is not None and bias.shape != (M,):
            raise ValueError(f"bias has shape {tuple(bias.shape)} where weight has {M} rows; it must be ({M},)")
        self.weight = weight.detach() if isinstance(weight, Tensor) else weight
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.norm, self.swiglu = norm, swiglu
        self.width = 2 * K if swiglu else K
        self._gemm_rows = GEMM_ROWS.get(weight.dtype, 0)
        self._kernel = None
        if _native(self.weight, self.bias, norm):
            self._kernel = kernel("luciola_linear")
            # The tensors whose addresses the struct holds are kept with it.
            self._struct, self._kept = _struct(self.weight, self.bias, norm, swiglu)
            self._address = ctypes.addressof(self._struct)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made of copied tensors: the addresses in the struct are not theirs."""
        return _product, (self.weight, self.bias, self.norm, self.swiglu)

    def __call__(self, x_NK: Tensor, residual: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """x_NK: float32 or bfloat16, (N, K), or (N, 2K) for SwiGLU; residual: (N, M). Returns (N, M) float32.

        With `exact` the kernel works whatever N is, so that every row's result is that of the row alone.

        Raises:
            ValueError: x_NK or residual has another shape.
        """
        N, width = x_NK.shape
        if width != self.width:
            raise ValueError(f"x has {width} columns where this product takes {self.width}")
        if residual is not None and residual.shape != (N, self.M):
            raise ValueError(f"residual has shape {tuple(residual.shape)} where the result has ({N}, {self.M})")
        many = not exact and self._gemm_rows <= N
        if many or self._kernel is None or not x_NK.is_cpu or (x_NK.requires_grad and torch.is_grad_enabled()):
            return formula(x_NK, self.weight, self.bias, norm=self.norm, swiglu=self.swiglu, residual=residual)
        if x_NK.dtype is not torch.float32 or x_NK.stride(1) != 1:
            x_NK = x_NK.float().contiguous()
        y_NM = torch.empty(N, self.M, dtype=torch.float32)
        added = None
        if residual is not None:
            residual = residual.float().contiguous()
            added = residual.data_ptr()
        if self._kernel(_Call(y_NM.data_ptr(), x_NK.data_ptr(), added, self._address, N, x_NK.stride(0)), self):
            raise MemoryError(f"no memory for {N} rows of {self.K} float32 numbers")
        return y_NM


def _product(weight: Tensor | Quantized, bias: Tensor | None, norm: RMSNorm | None, swiglu: bool) -> Product:
    return Product(weight, bias, norm=norm, swiglu=swiglu)


def linear(
    x_NK: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    swiglu: bool = False,
    residual: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """y = W f(x) (+ bias) (+ residual), (N, M) float32: a `Product` made for one call. See there for the arguments.

    Where gradients are recorded, PyTorch's formula is differentiated.
    """
    if torch.is_grad_enabled() and (x_NK.requires_grad or getattr(weight, "requires_grad", False)):
        return formula(x_NK, weight, bias, norm=norm, swiglu=swiglu, residual=residual)
    return Product(weight, bias, norm=norm, swiglu=swiglu)(x_NK, residual, exact=exact)


def _native(weight: Tensor | Quantized, bias: Tensor | None, norm: RMSNorm | None) -> bool:
    """Whether the kernel takes these: on the CPU, of the dtypes it knows."""
    on_cpu = weight.device.type == "cpu" and (bias is None or bias.is_cpu) and (norm is None or norm.weight.is_cpu)
    plain_norm = norm is None or norm.weight.dtype in (torch.float32, torch.bfloat16)
    return on_cpu and plain_norm and weight.dtype in _KINDS and kernel("luciola_linear") is not None


def _struct(
    weight: Tensor | Quantized, bias: Tensor | None, norm: RMSNorm | None, swiglu: bool
) -> tuple[_Matrix, list[Tensor]]:
    """The kernel's view of a matrix, and the tensors whose memory it refers to."""
    M, K = weight.shape
    struct = _Matrix(M=M, K=K, kind=_KINDS[weight.dtype], f=_SWIGLU if swiglu else _IDENTITY)
    if isinstance(weight, Tensor):
        if K > 1 and weight.stride(1) != 1:
            raise ValueError("the rows of weight must be contiguous; pass weight.contiguous()")
        named = {"data": weight}
    else:
        named = {"data": weight.packed, "scales": weight.scales}
        if weight.minima is not None:
            named["minima"] = weight.minima
        struct.groups, struct.shift = weight.scales.shape[-1], weight.group.bit_length() - 1
    struct.stride = named["data"].stride(0) * named["data"].itemsize
    if bias is not None:
        named["bias"] = bias
    if norm is not None:
        named["norm"] = norm.weight.detach()
        struct.f = _NORM if norm.weight.dtype == torch.float32 else _NORM_BFLOAT16
        struct.eps = norm.eps
    for name, tensor in named.items():
        setattr(struct, name, tensor.data_ptr())
    return struct, list(named.values())
