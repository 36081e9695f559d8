"""SwiGLU feed-forward (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from luciola.model.joined import Joined
from luciola.model.native.linear import linear
from luciola.model.norm import RMSNorm


class SwiGLU(nn.Module):
    """The dense feed-forward of every DeepSeek model, and the form of each expert."""

    def __init__(self, hidden: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., hidden); returns the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]

    def join(self) -> None:
        """Lay the weights that meet the same input below each other, for `decode`."""
        self.inputs = Joined([self.gate_proj, self.up_proj])

    def decode(self, x_ND: Tensor, norm: RMSNorm, exact: bool = False) -> Tensor:
        """x + the feed-forward of norm(x) for N new tokens."""
        h_NJ, down = self.inputs(x_ND, norm, exact), self.down_proj
        return linear(h_NJ, down.weight, down.bias, swiglu=True, residual=x_ND, exact=exact)
