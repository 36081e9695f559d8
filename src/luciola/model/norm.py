"""RMSNorm (Zhang and Sennrich, 2019): y = w * x / sqrt(mean(x^2) + eps), statistics in float32.

The backward pass is written out: with xhat = x * r, r = 1 / sqrt(mean(x^2) + eps) and g the gradient of y,

    dx = r * (g w - xhat * mean(g w * xhat)),    dw = sum over rows of g * xhat

Autograd's own chain for the same formula reads and writes memory about three times as often, and on a CPU that is its cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        x32 = x.float()
        width = x.shape[-1]
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        r = torch.rsqrt(norm.square_().div_(width).add_(eps))
        xhat = (x32 * r).to(x.dtype)
        ctx.save_for_backward(xhat, r, weight)
        return xhat * weight

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        xhat, r, weight = ctx.saved_tensors
        width = xhat.shape[-1]
        dw = (g * xhat).reshape(-1, width).sum(0)
        gw = g * weight
        mean = (gw * xhat).sum(-1, keepdim=True).div_(width)
        dx = torch.addcmul(gw, xhat, mean.to(xhat.dtype), value=-1).mul_(r.to(xhat.dtype))
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
