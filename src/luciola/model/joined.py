"""Projections of the same input as one product: their weights lie below each other in memory.

The parameters stay what they are, for training, saving and everyone else; only their memory is shared. A step of
decoding then reads one matrix where it would have read two or three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luciola.model.native.linear import Product
from luciola.model.norm import RMSNorm
from luciola.model.quant import Quantized


class SideBySide:
    """Products of the same input, their results next to each other."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products

    def __call__(self, x_NK: Tensor, residual: None = None, *, exact: bool = False) -> Tensor:
        return torch.cat([product(x_NK, exact=exact) for product in self.products], dim=-1)


def weight_of(module: nn.Module) -> Tensor | Quantized:
    """The matrix of a linear module, quantised or not."""
    weight: Tensor | Quantized = getattr(module.weight, "quantized", module.weight)  # type: ignore[arg-type]
    return weight


def joined(modules: Sequence[Any], norm: RMSNorm) -> Product | SideBySide:
    """All outputs of linear modules, of the normed input, side by side: as one product where their weights can be laid
    below each other."""
    weights, biases = [weight_of(module) for module in modules], [module.bias for module in modules]
    weight: Tensor | Quantized | None = None
    if all(bias is None for bias in biases) or all(bias is not None for bias in biases):
        if all(isinstance(w, Quantized) for w in weights):
            weight = Quantized.joined(weights)  # type: ignore[arg-type]
        elif not any(isinstance(w, Quantized) for w in weights):
            weight = below_each_other(weights)  # type: ignore[arg-type]
    if weight is None:
        return SideBySide([Product(w, bias, norm=norm) for w, bias in zip(weights, biases, strict=True)])
    if isinstance(weight, Quantized):
        start = 0
        for module in modules:
            module.move(weight.rows(start, start + module.out_features))
            start += module.out_features
    bias = None if biases[0] is None else below_each_other(biases)
    return Product(weight, bias, norm=norm)


def below_each_other(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor over the memory of all, after moving them to where that is possible."""
    first = parameters[0]
    storage, end, adjacent = first.untyped_storage().data_ptr(), first.data_ptr(), True
    for p in parameters:
        adjacent &= p.data_ptr() == end and p.is_contiguous() and p.untyped_storage().data_ptr() == storage
        end += p.nbytes
    if not adjacent:
        whole = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            p.data = part
    return first.detach().as_strided((sum(len(p) for p in parameters), *first.shape[1:]), first.stride())
