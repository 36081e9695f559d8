"""SwiGLU feed-forward (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from luciola.model.joined import joined, weight_of
from luciola.model.native import pointwise
from luciola.model.native.linear import Product
from luciola.model.native.repeat import usable
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
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = pointwise.swiglu(gate, up) if usable(gate, up) else F.silu(gate) * up
        return self.down_proj(h)  # type: ignore[no-any-return]

    def prepare(self, norm: RMSNorm) -> None:
        """Make ready for `decode`, where `norm` comes before the feed-forward."""
        self.inputs = joined([self.gate_proj, self.up_proj], norm)
        self.output = Product(weight_of(self.down_proj), self.down_proj.bias, swiglu=True)

    def decode(self, x_ND: Tensor, exact: bool = False) -> Tensor:
        """x + the feed-forward of norm(x) for N new tokens."""
        return self.output(self.inputs(x_ND, exact=exact), x_ND, exact=exact)
