"""A mixture-of-experts layer for the few tokens of a decoding step, with its norm and its residual, in one call.

The kernel reads each chosen expert once, whichever tokens chose it. No bit of a token's result depends on the other
tokens of the step or on the number of threads. It is the faster one up to some 500 tokens; prompts go through the
modules.

Shapes: N tokens, D hidden, E routed experts, K chosen a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from luciola.model.moe import MoE
from luciola.model.native.attention import float_weight
from luciola.model.native.repeat import kernel
from luciola.model.norm import RMSNorm


class _Call(ctypes.Structure):
    """What `luciola_moe` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "indices", "scores", "x", "norm", "gate", "bias")),
        *((name, ctypes.c_void_p) for name in ("gate_up", "down", "shared_gate", "shared_up", "shared_down")),
        ("shared_inner", ctypes.c_int64),
        ("shared_half", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("x_stride", "N", "D", "inner", "E", "K", "groups", "kept_groups")),
        *((name, ctypes.c_int32) for name in ("gate_half", "half", "sigmoid", "biased", "normalised")),
        *((name, ctypes.c_float) for name in ("eps", "scaling")),
    )


READ = (torch.float32, torch.bfloat16)  # weights that the kernel takes


def moe(x_ND: Tensor, layer: MoE, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + layer(norm(x)) for few tokens: y (N, D) in x's dtype, the chosen experts (N, K) int64 and every expert's
    affinity (N, E) float32. Among equal affinities the kernel takes the expert with the lower number.

    Not recorded by autograd. Raises ValueError where x is not as wide as the layer. Source: DeepSeekMoE paper, section
    3; `MoE.forward`.
    """
    native = kernel("luciola_moe")
    # Each lookup through Module.__getattr__ would cost as much as a small product.
    parts: dict[str, Any] = layer._modules
    gate, experts, shared = parts["gate"], parts["experts"]._parameters, parts.get("shared_experts")
    W_gate, W_gate_up, W_down = gate._parameters["weight"], experts.get("gate_up_proj"), experts.get("down_proj")
    if W_gate_up is None or W_down is None:  # they are quantised
        return moe_formula(x_ND, layer, norm)
    (tokens, hidden), (apart, dense), (number, width, inner) = x_ND.shape, x_ND.stride(), W_down.shape
    if native is None or x_ND.dtype is not torch.float32 or not x_ND.is_cpu or dense != 1:
        return moe_formula(x_ND, layer, norm)
    if not _read(W_gate_up, W_down, W_gate) or W_gate_up.dtype is not W_down.dtype:
        return moe_formula(x_ND, layer, norm)
    shared_weights: tuple[Tensor, ...] = ()
    of_shared: tuple[int | None, ...] = (None, None, None, 0, False)
    if shared is not None:
        names = ("gate_proj", "up_proj", "down_proj")
        W_g, W_u, W_d = (shared._modules[name]._parameters.get("weight") for name in names)
        if W_g is None or W_u is None or W_d is None:
            return moe_formula(x_ND, layer, norm)
        if not _read(W_g, W_u, W_d) or not W_g.dtype is W_u.dtype is W_d.dtype:
            return moe_formula(x_ND, layer, norm)
        shared_weights = (W_g, W_u, W_d)
        of_shared = (W_g.data_ptr(), W_u.data_ptr(), W_d.data_ptr(), W_g.shape[0], W_g.dtype is torch.bfloat16)
    if width != hidden:
        raise ValueError(f"x_ND: {hidden} numbers a token, but the layer takes {width}; pass its own input")
    scale, config = float_weight(norm), gate.config
    method, chosen, sigmoid = config.topk_method, config.num_experts_per_tok, config.scoring_func == "sigmoid"
    biased = method == "noaux_tc"
    bias = gate._buffers["e_score_correction_bias"] if biased else None
    y_ND = torch.empty(tokens, hidden)
    indices_NK = torch.empty(tokens, chosen, dtype=torch.int64)
    scores_NE = torch.empty(tokens, number)
    failure = native(_Call(
        y_ND.data_ptr(), indices_NK.data_ptr(), scores_NE.data_ptr(), x_ND.data_ptr(), scale.data_ptr(),
        W_gate.data_ptr(), None if bias is None else bias.data_ptr(),
        W_gate_up.data_ptr(), W_down.data_ptr(), *of_shared,
        apart, tokens, hidden, inner, number, chosen, 1 if method == "greedy" else config.n_group, config.topk_group,
        W_gate.dtype is torch.bfloat16, W_down.dtype is torch.bfloat16, sigmoid, biased,
        config.norm_topk_prob and (sigmoid or chosen > 1), norm.eps, config.routed_scaling_factor,
    ), scale, W_gate, W_gate_up, W_down, *shared_weights, bias)  # fmt: skip
    if failure:
        raise MemoryError(f"no memory for the scratch space of {tokens} tokens and {number} experts; use fewer tokens")
    return y_ND, indices_NK, scores_NE


@torch.no_grad()
def moe_formula(x_ND: Tensor, layer: MoE, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """`moe` by the modules themselves."""
    y_BTD, routing = layer(norm(x_ND).to(layer.gate.weight.dtype).unsqueeze(0))
    return x_ND + y_BTD[0].to(x_ND.dtype), routing.indices_BTK[0], routing.scores_BTE[0]


def _read(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether the kernel reads these weights: of a type that it knows, without gaps."""
    return (
        a.dtype in READ
        and b.dtype in READ
        and c.dtype in READ
        and a.is_contiguous()
        and b.is_contiguous()
        and c.is_contiguous()
    )
