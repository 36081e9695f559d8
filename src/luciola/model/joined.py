"""Projections of the same input as one product: their weights lie below each other in memory.

The parameters stay what they are, for training, saving and everyone else; only their memory is shared. A step of decoding
then reads one matrix where it would have read two or three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luciola.model.native.linear import linear
from luciola.model.norm import RMSNorm
from luciola.model.quant import Quantized


class Joined:
    """The outputs of several linear modules, side by side, of few tokens.

    A training step changes the weights in place and is seen here; whoever gives a parameter other memory (`module.to`)
    must join anew.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.weight: Tensor | Quantized | None = None
        self.bias: Tensor | None = None
        weights = [module.weight for module in self.modules]
        if all(isinstance(weight, Quantized) for weight in weights):
            self.weight = Quantized.joined(weights)  # None where they are quantised in different ways
        elif not any(isinstance(weight, Quantized) for weight in weights):
            self.weight = _below_each_other(weights)
        biases = [module.bias for module in self.modules if module.bias is not None]
        if len(biases) == len(self.modules):
            self.bias = _below_each_other(biases)
        elif biases:
            self.weight = None
        self._places = [weight.data_ptr() for weight in weights]

    @property
    def current(self) -> bool:
        """Whether the modules' weights are still where they were."""
        return self._places == [module.weight.data_ptr() for module in self.modules]

    def __call__(self, x_ND: Tensor, norm: RMSNorm, exact: bool = False) -> Tensor:
        """Of the normed x, (N, sum of the modules' outputs), float32; `exact`: see `linear`."""
        if self.weight is not None:
            return linear(x_ND, self.weight, self.bias, norm=norm, exact=exact)
        parts = [linear(x_ND, m.weight, m.bias, norm=norm, exact=exact) for m in self.modules]  # type: ignore[arg-type]
        return torch.cat(parts, dim=-1)


@torch.inference_mode(False)
@torch.no_grad()
def _below_each_other(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor over the memory of all, after moving them to where that is possible."""
    first = parameters[0]
    end = first.data_ptr()
    adjacent = True
    for p in parameters:
        adjacent &= p.data_ptr() == end and p.is_contiguous()
        adjacent &= p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        end += p.nbytes
    shape = (sum(len(p) for p in parameters), *first.shape[1:])
    if not adjacent:
        whole = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return first.detach().as_strided(shape, first.stride())
