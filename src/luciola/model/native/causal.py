"""Causal softmax attention of whole sequences, differentiable, by a kernel for float32 on the CPU (causal.c).

    s = scale q k^T,  p = softmax(s),  o = p v;      with L = log sum e^s kept, p = e^(s - L) is computed again for
    dv = p^T do,  ds = p (do v^T - do . o),  dq = scale ds k,  dk = scale ds^T q

PyTorch's kernels are made for long rows. In short ones, a hundred tokens or so, most of their time goes into starting
and into memory; and rows that share a beginning, such as the completions of one prompt, would have to be written out.
Here the shared tokens are read once, and their queries answered once. No bit of the result depends on the number of
threads.

Shapes: B rows, T tokens of a row, N tokens in a flat list, H query heads, G key-value heads, D width of queries and
keys, V of values.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luciola.model.layout import Layout
from luciola.model.native.repeat import Kernel, kernel


class _Heads(ctypes.Structure):
    """`Heads` of causal.c."""

    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "token", "head")))


class _Causal(ctypes.Structure):
    """`Causal` of causal.c."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "o", "g", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("logsum", "tokens", "starts", "shared", "begins")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "width", "v_width", "window")),
        ("scale", ctypes.c_float),
    )


def causal_attend(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    scale: float,
    window: int | None = None,
    begins_BT: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Each token's attention to itself and what comes before it in its row; returns (B, T, H, V).

    Args:
        window: a token sees itself and the window - 1 tokens before it.
        begins_BT: the first position that each token may see; never falls along a row.
        layout: the rows of tokens that stand in a flat list, (1, H, N, D) and so on.

    Raises:
        MemoryError: the kernel found no scratch space.
    """
    return _CausalFunction.apply(q_BHTD, k_BGTD, v_BGTV, scale, window, begins_BT, layout)  # type: ignore[no-any-return]


class _CausalFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTV, scale, window, begins_BT, layout):  # type: ignore[no-untyped-def]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BGTD, v_BGTV))
        B, H, T, _ = q.shape
        o_BTHV, logsum = q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, T, H)
        ctx.settings = (scale, window, begins_BT, layout)
        _call(q, k, v, o_BTHV, logsum, (), *ctx.settings)
        ctx.save_for_backward(q, k, v, o_BTHV, logsum)
        return o_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx, g_BTHV):  # type: ignore[no-untyped-def]
        q, k, v, o_BTHV, logsum = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        g_BTHV = g_BTHV if g_BTHV.stride(-1) == 1 else g_BTHV.contiguous()
        _call(q, k, v, o_BTHV, logsum, (g_BTHV.transpose(1, 2), *gradients), *ctx.settings)
        return *gradients, None, None, None, None


def _call(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    o_BTHV: Tensor,
    logsum: Tensor,
    gradients: tuple[Tensor, ...],
    scale: float,
    window: int | None,
    begins_BT: Tensor | None,
    layout: Layout | None,
) -> None:
    """Fill `o_BTHV` and `logsum`, or where `gradients` has that of the output the other three of it."""
    (B, H, T, D), tokens, shared = q_BHTD.shape, None, None
    if layout is None:
        rows, starts = B, torch.arange(B + 1) * T
    else:
        rows, starts, tokens, shared = layout.shape[0], layout.starts_B, layout.tokens_M, layout.shared_B
    begins = None if begins_BT is None else begins_BT.contiguous()
    tensors = (q_BHTD, k_BGTD, v_BGTV, o_BTHV.transpose(1, 2), *gradients)
    arguments = _Causal(
        *(_heads(x, layout) for x in tensors),
        *(_Heads() for _ in range(8 - len(tensors))),
        *(None if x is None else x.data_ptr() for x in (logsum, tokens, starts, shared, begins)),
        *(rows, H, k_BGTD.shape[1], D, v_BGTV.shape[-1], window or 0),
        scale,
    )
    native: Any = kernel("luciola_causal")
    assert isinstance(native, Kernel)
    if native(arguments):
        raise MemoryError("attention found no memory for its scratch space; take smaller micro-batches")


def _heads(x_BHTD: Tensor, layout: Layout | None) -> _Heads:
    row, head, token, _ = x_BHTD.stride()
    return _Heads(x_BHTD.data_ptr(), 0 if layout is not None else row, token, head)
