"""A model whose quantised tensors in a file stay quantised in memory, number for number."""

from __future__ import annotations

import torch
from torch import nn

from luciola.model.experts import Experts
from luciola.model.quant import Quantized
from luciola.model.quant_layers import KEPT, QuantExperts, QuantLinear
from luciola.model.transformer import Transformer
from luciola.weights.checkpoint import Blank, Checkpoint


def quantised_model(checkpoint: Checkpoint) -> Transformer:
    """The Transformer for inference: matrices of linear layers and experts as the file has them where that is 8 or 4
    bits in groups of 32 (Q8_0, Q4_0, Q4_1), everything else in float32.

    A tied head is the embedding's blocks once more. `quantize_model` quantises what is left, by its rule.

    Raises:
        ValueError: a tensor is damaged.
    """
    with Blank(torch.float32):
        model = Transformer(checkpoint.config)  # the memory of what is replaced is never touched
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(KEPT):
            tied = name == "lm_head" and checkpoint.config.tie_word_embeddings
            weight = _assembled(checkpoint, "embed_tokens.weight" if tied else f"{name}.weight")
            if weight is not None:
                replaced[name] = QuantLinear(weight, module.bias)
        elif isinstance(module, Experts):
            gate_up, down = (_assembled(checkpoint, f"{name}.{part}") for part in ("gate_up_proj", "down_proj"))
            if gate_up is not None and down is not None:
                replaced[name] = QuantExperts(gate_up, down)
    for name, module in replaced.items():
        model.set_submodule(name, module)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name in checkpoint.parts:
                checkpoint.fill(name, parameter)
    return model.requires_grad_(False)


def _assembled(checkpoint: Checkpoint, name: str) -> Quantized | None:
    """The parameter `name` from the tensors that make it up, quantised; None where one of them is not, where they
    differ in bits, or where the file has its columns in another order: groups run along them."""
    whole, shape = None, checkpoint.shapes[name]
    for part in checkpoint.parts[name]:
        piece, index = checkpoint.blocks(part), checkpoint.places[part].index()
        if piece is None or len(index) >= len(shape) or (whole is not None and whole.bits != piece.bits):
            return None
        scales = piece.scales if piece.minima is None else torch.stack((piece.scales, piece.minima))
        if not scales.isfinite().all():
            raise ValueError(
                f"{checkpoint.path} is damaged: tensor {part} has scales that are not finite; fetch it again."
            )
        if whole is None:
            whole = Quantized.empty(shape, piece.bits, piece.group)
        whole.put(index, piece)
    return whole
