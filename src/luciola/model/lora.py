"""Low-rank adaptation, LoRA (Hu et al., 2021, equation 3): frozen matrices W_0 are moved by products of two thin ones.

    W = W_0 + s B A        s = alpha / R, or alpha / sqrt(R) (rsLoRA: Kalajdzievski, 2023)

The model always holds the sum W, made anew after each update, and knows nothing of A and B. So training, sampling,
evaluation and saving read the very same weights, as in full fine-tuning, and no code of theirs is different. Gradients
reach A and B by the chain rule from that of W, which is freed as soon as it has been used: one matrix has a gradient of
full size at a time, none has moments.

    dA = s B^T dW          dB = s dW A^T

Dropout belongs to the input of A alone; what it changes is added to the output: y = W x + s B A (dropout(x) - x).

Shapes: O output features of a matrix, I inputs, R rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luciola.model.transformer import Transformer
from luciola.recipe import LoraSection


class LowRank(NamedTuple):
    """One adapted matrix: the module whose weight it is, its W_0, and the trained A and B, float32."""

    module: nn.Linear
    W0_OI: Tensor
    A_RI: nn.Parameter
    B_OR: nn.Parameter


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """s, by which B A is multiplied."""
    return alpha / (rank**0.5 if rslora else rank)


def merged(W0_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """W_0 + s B A, float32: trainer and loader add up in the same way, and so to the same bits."""
    return torch.addmm(W0_OI.float(), B_OR.float(), A_RI.float(), alpha=scale)


class Lora:
    """The adapters of a model, which from then on is trained through them alone.

    A is drawn as PyTorch draws a linear layer's weights, from `seed`; B is 0, so that the model is what it was.

    Attributes:
        matrices: the adapted ones by the name of their module, such as "layers.0.self_attn.q_proj".
        section, scale: the recipe's settings, and s.
        base: where W_0 comes from, as a path that can be loaded.

    Raises:
        ValueError: target_modules names what cannot be adapted, or the rank is not below a matrix's.
    """

    def __init__(self, model: Transformer, section: LoraSection, seed: int, base: str) -> None:
        self.section, self.base, self._model = section, base, model
        self.scale = scaling(section.rank, section.alpha, section.rslora)
        self.matrices: dict[str, LowRank] = {}
        generator = torch.Generator().manual_seed(seed)
        model.requires_grad_(False)
        for name, module in targets(model, section).items():
            W_OI = module.weight
            outputs, inputs = W_OI.shape
            A_RI = torch.empty(section.rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            B_OR = torch.zeros(outputs, section.rank)
            A, B = (nn.Parameter(x.to(W_OI.device)) for x in (A_RI, B_OR))
            matrix = LowRank(module, W_OI.detach().clone(), A, B)
            self.matrices[name] = matrix
            W_OI.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._project, matrix))
            if section.dropout:
                module.register_forward_hook(partial(self._drop, matrix))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained: every A and B."""
        for name, matrix in self.matrices.items():
            yield f"{name}.lora_A", matrix.A_RI
            yield f"{name}.lora_B", matrix.B_OR

    def state(self) -> dict[str, Tensor]:
        """Copies of every A and B by name."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @cached_property
    def base_checksum(self) -> str:
        """CRC-32 of the base's weights: of every W_0 and all that training leaves alone."""
        value = 0
        for name, weight in self._model.named_parameters():
            matrix = self.matrices.get(name.removesuffix(".weight"))
            tensor = weight.detach() if matrix is None else matrix.W0_OI
            value = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
        return f"{value:08x}"

    def merge(self) -> None:
        """Bring the model's weights up to date with A and B."""
        self.merge_into(dict(self.named_parameters()), {name: m.module for name, m in self.matrices.items()})

    @torch.no_grad()
    def merge_into(self, state: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
        """Make the weights of `modules`, by name, W_0 + s B A with the A and B of `state`."""
        for name, (_, W0_OI, *_) in self.matrices.items():
            W_OI = merged(W0_OI, state[f"{name}.lora_A"], state[f"{name}.lora_B"], self.scale)
            modules[name].weight.copy_(W_OI)

    @torch.no_grad()
    def _project(self, matrix: LowRank, W_OI: Tensor) -> None:
        assert W_OI.grad is not None
        dW_OI = W_OI.grad.float()
        W_OI.grad = None
        dA_RI = torch.mm(matrix.B_OR.T, dW_OI).mul_(self.scale)
        dB_OR = torch.mm(dW_OI, matrix.A_RI.T).mul_(self.scale)
        for parameter, gradient in ((matrix.A_RI, dA_RI), (matrix.B_OR, dB_OR)):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _drop(self, matrix: LowRank, module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # sampling and scoring are without dropout
            return None
        (x,) = inputs
        lost = F.dropout(x, self.section.dropout) - x
        return y + self.scale * F.linear(F.linear(lost, matrix.A_RI.to(x.dtype)), matrix.B_OR.to(x.dtype))


def targets(model: Transformer, section: LoraSection) -> dict[str, nn.Linear]:
    """The modules that get adapters: of all linear layers in attention and feed-forward, shared experts included, those
    that target_modules names. Routed experts are no linear layers but one stacked weight; they, the router, embedding,
    head and prediction modules stay as they are.

    Raises:
        ValueError: a name is none of these, or the rank is not below a matrix's.
    """
    linear = {name: m for name, m in model.named_modules() if name.startswith("layers.") and isinstance(m, nn.Linear)}
    if section.target_modules is None:
        chosen = linear
    else:
        known = sorted({name.rpartition(".")[2] for name in linear})
        for target in section.target_modules:
            if target not in known:
                raise ValueError(
                    f"lora.target_modules names '{target}', which gets no adapter here{_reason(target)}; "
                    f"this model has {', '.join(known)}"
                )
        chosen = {name: m for name, m in linear.items() if name.rpartition(".")[2] in section.target_modules}
    for name, module in chosen.items():
        if section.rank >= min(module.weight.shape):
            raise ValueError(
                f"lora.rank = {section.rank} is no less than the rank of {name}, which has the shape "
                f"{list(module.weight.shape)}; lower it, or leave {name.rpartition('.')[2]} out of lora.target_modules"
            )
    return chosen


def _reason(target: str) -> str:
    if target in ("experts", "gate_up_proj"):
        return ": routed experts are one stacked weight, not linear layers, and stay as they are"
    return ": a router that changed would send tokens to experts that never saw them" if target == "gate" else ""


def trained_parameters(model: Transformer, section: LoraSection) -> int:
    """How many numbers A and B of all adapted matrices hold."""
    return sum(section.rank * sum(module.weight.shape) for module in targets(model, section).values())
