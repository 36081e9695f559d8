"""What stands between the products of a layer, by kernels for float32 on the CPU (pointwise.c): each, forward or
backward, reads its input once and writes its result once, where PyTorch makes three to six passes over memory.

Where they do not run, `norm.py`, `mlp.py` and `rope.py` have the formulas. No bit depends on the number of threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luciola.model.native.repeat import kernel


class _Norm(ctypes.Structure):
    """`Norm` of pointwise.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "r", "x", "weight", "g", "dx", "dweight")),
        *((name, ctypes.c_int64) for name in ("N", "D")),
        ("eps", ctypes.c_float),
    )


class _Gated(ctypes.Structure):
    """`Gated` of pointwise.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "gate", "up", "dh", "dgate", "dup")),
        ("N", ctypes.c_int64),
    )


class _Turn(ctypes.Structure):
    """`Turn` of pointwise.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "x", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "d", "row", "head", "token", "angles")),
        ("sign", ctypes.c_float),
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps) of the last axis; returns y and r, x's shape without that axis."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    y, r = torch.empty_like(x), x.new_empty(x.shape[:-1])
    D = x.shape[-1]
    of = (y.data_ptr(), r.data_ptr(), x.data_ptr(), weight_D.data_ptr(), None, None, None)
    _run("luciola_rms_norm", _Norm(*of, x.numel() // D, D, eps))
    return y, r


def rms_norm_gradients(g: Tensor, x: Tensor, r: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dw, from the gradient of y and from what `rms_norm` was given and found."""
    g, x, weight_D = g.contiguous(), x.contiguous(), weight_D.contiguous()
    dx, dweight_D = torch.empty_like(x), torch.empty_like(weight_D)
    D = x.shape[-1]
    of = (None, *(t.data_ptr() for t in (r, x, weight_D, g, dx, dweight_D)))
    _run("luciola_rms_norm_gradients", _Norm(*of, x.numel() // D, D, 0.0))
    return dx, dweight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of tensors of one shape; differentiable."""
    return _SwiGLUFunction.apply(gate, up)  # type: ignore[no-any-return]


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        gate, up = gate.contiguous(), up.contiguous()
        h = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        of = (h.data_ptr(), gate.data_ptr(), up.data_ptr(), None, None, None)
        _run("luciola_swiglu", _Gated(*of, gate.numel()))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        dh, dgate, dup = dh.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        of = (None, *(t.data_ptr() for t in (gate, up, dh, dgate, dup)))
        _run("luciola_swiglu_gradients", _Gated(*of, gate.numel()))
        return dgate, dup


def turn(x_BHTd: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """Each pair (i, i + d/2) of features turned by its angle, or `back`; (T, d/2) or (B, T, d/2) of these. Dense.

    Raises ValueError where there are not as many angles."""
    B, _, T, d = x_BHTd.shape
    if cos.shape[-2:] != (T, d // 2) or (cos.ndim == 3 and len(cos) not in (1, B)) or cos.shape != sin.shape:
        raise ValueError(f"angles {list(cos.shape)} do not fit {list(x_BHTd.shape)}")
    x = x_BHTd if x_BHTd.stride(-1) == 1 else x_BHTd.contiguous()
    cos, sin, y_BHTd = cos.contiguous(), sin.contiguous(), x.new_empty(x.shape)
    angles = cos[0].numel() if cos.ndim == 3 and len(cos) > 1 else 0
    pointers = (t.data_ptr() for t in (y_BHTd, x, cos, sin))
    row, head, token, _ = x.stride()
    _run("luciola_turn", _Turn(*pointers, *x.shape, row, head, token, angles, -1.0 if back else 1.0))
    return y_BHTd


def _run(name: str, arguments: ctypes.Structure) -> None:
    native: Any = kernel(name)
    if native(arguments):
        raise MemoryError(f"{name} found no memory for its scratch space; take smaller micro-batches")
