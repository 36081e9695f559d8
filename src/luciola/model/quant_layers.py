"""A Transformer whose matrices are quantised: the layers that hold them, and the rule that chooses the bits of each.

The rule is measured, matrix by matrix. For inputs without a preferred direction the expected squared error of W x,
relative to that of W x itself, is |W' - W|^2 / |W|^2; its root is called the matrix's error.

    4 bits, if they were asked for and their error is at most a tenth more than that of normally distributed weights
    8 bits, if their error is at most 0.02, about three times that of normally distributed weights
    as it is otherwise, and where a matrix is too small to save anything

So what four bits serve worse than usual, for the sake of a few large weights, gets eight.

Norms, routers and the embedding stay as they are, and so do MLA's up-projection of latents and the projection in front
of a prediction module, of which decoding needs other views than their rows. A tied head is quantised as a copy: the
embedding is looked up, the head multiplied.

Shapes: N tokens, K experts a token or inputs, M outputs, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from luciola.model.experts import Experts
from luciola.model.native.linear import Product
from luciola.model.quant import BLOCK, GROUPS, Quantized, quantize
from luciola.model.transformer import Transformer

BOUNDS = {8: dict.fromkeys(GROUPS, 0.02), 4: {32: 0.081, 64: 0.094, 128: 0.104}}  # of the error, by bits and group
FEWEST = 1 << 14  # numbers of a matrix worth quantising
KEPT = ("kv_b_proj", "eh_proj")  # decoding multiplies the first from both sides, and halves of the second


class QuantWeight(nn.Module):
    """The tensors of a Quantized as buffers: moved with the model and never cast."""

    packed: Tensor
    scales: Tensor
    minima: Tensor | None

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.shape, self.group = weight.shape, weight.group
        for name in ("packed", "scales", "minima"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.packed, self.scales, self.minima, self.shape, self.group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales, minima = self.scales, self.minima
        super()._apply(fn, recurse)
        self.scales = scales.to(self.packed.device)
        self.minima = None if minima is None else minima.to(self.packed.device)
        return self

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.quantized.bits}, group={self.group}"


def is_quantised(model: nn.Module) -> bool:
    """Whether any of its matrices is."""
    return any(isinstance(module, QuantWeight) for module in model.modules())


class _Quantised(nn.Module):
    """What both layers share: their products hold addresses, so they are made at the first call and again after the
    tensors have moved, and no copy of the layer takes them along."""

    def __init__(self) -> None:
        super().__init__()
        self._products: list[Any] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._products = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_products": None}


class QuantLinear(_Quantised):
    """What nn.Linear computes, from a quantised weight; the bias keeps its precision."""

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = QuantWeight(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def move(self, weight: Quantized) -> None:
        """Use the same numbers from another place in memory."""
        self.weight, self._products = QuantWeight(weight), None

    @property
    def product(self) -> Product:
        """The product itself, to call with (N, K) and a residual."""
        if self._products is None:
            self._products = [Product(self.weight.quantized, self.bias)]
        product: Product = self._products[0]
        return product

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K); returns (..., M) in the dtype of x."""
        y_NM = self.product(x.reshape(-1, self.in_features))
        return y_NM.view(*x.shape[:-1], self.out_features).to(x.dtype)


class QuantExperts(_Quantised):
    """What Experts computes, from quantised stacks: gate_up_proj (E, 2I, D) and down_proj (E, D, I)."""

    def __init__(self, gate_up_proj: Quantized, down_proj: Quantized) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = QuantWeight(gate_up_proj), QuantWeight(down_proj)

    @property
    def products(self) -> list[tuple[Product, Product]]:
        """Each expert's two products; the second takes what the first gives, and applies SwiGLU to it."""
        if self._products is None:
            gate_up, down = self.gate_up_proj.quantized, self.down_proj.quantized
            self._products = [
                (Product(gate_up.expert(e)), Product(down.expert(e), swiglu=True)) for e in range(gate_up.shape[0])
            ]
        return self._products

    def forward(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, (N, D), in the dtype of x_ND."""
        y_ND = torch.zeros(x_ND.shape, device=x_ND.device)
        for e in indices_NK.unique().tolist():
            gate_up, down = self.products[e]
            token, k = (indices_NK == e).nonzero(as_tuple=True)
            y_ND.index_add_(0, token, down(gate_up(x_ND[token])) * weights_NK[token, k].float().unsqueeze(1))
        return y_ND.to(x_ND.dtype)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the rule decided about one matrix, or stack of experts.

    Attributes:
        bits: 4, 8, or those of its float dtype where it stayed as it was.
        error: |W' - W| / |W|, 0 where it stayed.
        nbytes, nbytes_before: with and without quantisation.
    """

    name: str
    bits: int
    error: float
    nbytes: int
    nbytes_before: int


@dataclass(frozen=True, slots=True)
class Report:
    """The choices, in the order of the model; as text, a line for each and a sum."""

    choices: list[Choice]

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices)

    def __str__(self) -> str:
        lines = [f"{c.name:<44} {c.bits:>2} bits   error {c.error:.4f}   {c.nbytes:>13,} bytes" for c in self.choices]
        before = sum(choice.nbytes_before for choice in self.choices)
        return "\n".join([*lines, f"{len(lines)} matrices: {self.nbytes:,} bytes, {before:,} before"])


def choose(name: str, weight: Tensor, bits: int, group: int = BLOCK) -> tuple[Quantized | None, Choice]:
    """The matrix or stack `weight` in the fewest bits that the rule allows, not below `bits`; None: it stays float."""
    if weight.numel() >= FEWEST and weight.shape[-1] >= group:
        norm = weight.float().norm().item()
        for tried in (4, 8) if bits == 4 else (8,):
            quantized = quantize(weight, tried, group)
            error = quantized.dequantize().sub_(weight).norm().item() / max(norm, 1e-30)
            if error <= BOUNDS[tried][group]:
                return quantized, Choice(name, tried, error, quantized.nbytes, weight.nbytes)
    return None, _kept(name, weight)


def _kept(name: str, weight: Tensor) -> Choice:
    return Choice(name, 8 * weight.itemsize, 0.0, weight.nbytes, weight.nbytes)


@torch.no_grad()
def quantize_model(model: Transformer, bits: int, group: int = BLOCK) -> tuple[Transformer, Report]:
    """A copy of the model for inference, with the matrices of its linear layers and experts quantised by the rule.

    The model itself is not touched, and the copy refers to none of its tensors. Layers that are quantised already stay
    as they are.

    Raises:
        ValueError: bits is not 4 or 8, group not 32, 64 or 128, or a weight is not finite.
    """
    choices: list[Choice] = []
    replaced: dict[int, Any] = {}  # a module's id, and what stands in its place when the model is copied
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(KEPT):
            weight, choice = choose(f"{name}.weight", module.weight, bits, group)
            choices.append(choice)
            if weight is not None:
                replaced[id(module)] = QuantLinear(weight, module.bias)
        elif isinstance(module, Experts):
            stacks = {f"{name}.{part}": getattr(module, part) for part in ("gate_up_proj", "down_proj")}
            chosen = [choose(part, stack, bits, group) for part, stack in stacks.items()]
            (gate_up, _), (down, _) = chosen
            if gate_up is None or down is None:
                choices += [_kept(part, stack) for part, stack in stacks.items()]
            else:
                choices += [choice for _, choice in chosen]
                replaced[id(module)] = QuantExperts(gate_up, down)
    return copy.deepcopy(model, replaced).requires_grad_(False), Report(choices)
