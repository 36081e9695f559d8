"""RMSNorm (Zhang and Sennrich, 2019): y = w * x / sqrt(mean(x^2) + eps), statistics in float32 or better.

The backward pass is written out: with r = 1 / sqrt(mean(x^2) + eps), D the width and g the gradient of y,

    dx = r g w - x r^3 / D * sum(g x w),    dw = sum over rows of r g x

Both sums are matrix-vector products of the one intermediate g x. Autograd's own chain for the same formula reads and
writes memory about three times as often, and on a CPU that is its cost; `native.pointwise` does it in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luciola.model.native import pointwise
from luciola.model.native.repeat import usable


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        if usable(x, weight):
            y, r = pointwise.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, r, weight)
            return y
        precision = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precision)
        r = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, r, weight)
        return (x * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        x, r, weight = ctx.saved_tensors
        if usable(g, x, weight):
            return *pointwise.rms_norm_gradients(g, x, r, weight), None
        width = x.shape[-1]
        gx = (g * x).reshape(-1, width).to(r.dtype)
        dw = torch.mv(gx.T, r.view(-1)).to(weight.dtype)
        mean = torch.mv(gx, weight.to(r.dtype)).view_as(r).mul_(r**3).div_(-width)
        dx = torch.addcmul((g * weight).mul_(r), x, mean.to(x.dtype))
        return dx, dw, None


class RMSNorm(nn.Module):
    """Normalise the last axis to root mean square 1 and scale it by a learnt weight of the same width."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any float dtype; returns the same shape and dtype."""
        y: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)
        return y
