"""The two ends of a decoding step: the embedding's rows that tokens stand for, and the norm of the final states.

In PyTorch either costs a small model as much as a layer, and neither can be recorded with the layers in between.

Shapes: N tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.model.native.repeat import kernel
from luciola.model.norm import RMSNorm

READ = (torch.float32, torch.bfloat16)  # weights that the kernels take


class _Embed(ctypes.Structure):
    """What `luciola_embed` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "tokens", "table")),
        *((name, ctypes.c_int64) for name in ("N", "V", "D")),
        ("half", ctypes.c_int32),
    )


class _Norm(ctypes.Structure):
    """What `luciola_norm` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "x", "weight")),
        *((name, ctypes.c_int64) for name in ("N", "D")),
        ("half", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


def embed(tokens_N: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the embedding, (N, D) float32, for int64 tokens. Not recorded by autograd. Raises IndexError where a
    token is outside the vocabulary."""
    native, (V, D), N = kernel("luciola_embed"), weight_VD.shape, len(tokens_N)
    if native is None or not _read(weight_VD) or tokens_N.dtype is not torch.int64 or not tokens_N.is_contiguous():
        return F.embedding(tokens_N, weight_VD).float()
    y_ND = torch.empty(N, D, dtype=torch.float32)
    half = weight_VD.dtype is torch.bfloat16
    call = _Embed(y_ND.data_ptr(), tokens_N.data_ptr(), weight_VD.data_ptr(), N, V, D, half)
    if native(call, tokens_N, weight_VD):
        raise IndexError(f"a token among {tokens_N.tolist()} is outside the vocabulary of {V}")
    return y_ND


def normed(x_ND: Tensor, norm: RMSNorm) -> Tensor:
    """`norm(x_ND)`, (N, D) float32, of float32 states. Not recorded by autograd."""
    native, weight = kernel("luciola_norm"), norm.weight
    if native is None or not _read(weight) or x_ND.dtype is not torch.float32 or not x_ND.is_contiguous():
        return F.rms_norm(x_ND, weight.shape, weight.float(), norm.eps)
    N, D = x_ND.shape
    y_ND = torch.empty(N, D, dtype=torch.float32)
    half = weight.dtype is torch.bfloat16
    native(_Norm(y_ND.data_ptr(), x_ND.data_ptr(), weight.data_ptr(), N, D, half, norm.eps), weight)
    return y_ND


def _read(weight: Tensor) -> bool:
    """Whether the kernels read it."""
    return weight.dtype in READ and weight.is_cpu and weight.is_contiguous()
