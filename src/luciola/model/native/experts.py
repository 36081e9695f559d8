"""A mixture-of-experts layer for the few tokens of a decoding step, with its norm and its residual, in one call.

The kernel reads each chosen expert once, whichever tokens chose it. No bit of a token's result depends on the other
tokens of the step or on the number of threads.

Shapes: N tokens, D hidden, E routed experts, K chosen a token.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from luciola.model.moe import MoE
from luciola.model.native.build import library
from luciola.model.norm import RMSNorm

READ = (torch.float32, torch.bfloat16)  # weights that the kernel takes


def moe(x_ND: Tensor, layer: MoE, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y = x + layer(norm(x)) for few tokens: y (N, D) in x's dtype, the chosen experts (N, K) int64 and every expert's
    affinity (N, E) float32. Among equal affinities the kernel takes the expert with the lower number.

    Source: DeepSeekMoE paper, section 3; `MoE.forward`. Not recorded by autograd.
    """
    native = _library()
    gate, experts = layer.gate, layer.experts
    W_gate, W_gate_up, W_down = gate.weight, experts.gate_up_proj, experts.down_proj
    shared = layer._modules.get("shared_experts")
    if shared is None:
        of_shared: tuple[Tensor, ...] = ()
    else:
        of_shared = tuple(_weight(shared, name) for name in ("gate_proj", "up_proj", "down_proj"))
    if native is None or not _served(x_ND, (W_gate_up, W_down), of_shared, W_gate):
        return moe_formula(x_ND, layer, norm)
    config, scale = gate.config, norm.weight
    if scale.dtype is not torch.float32:
        scale = torch.nn.Parameter(scale.float(), requires_grad=False)
    (tokens, hidden), (number, _, inner) = x_ND.shape, W_down.shape
    chosen = config.num_experts_per_tok
    assert chosen is not None
    biased, sigmoid = config.topk_method == "noaux_tc", config.scoring_func == "sigmoid"
    y_ND = torch.empty(tokens, hidden)
    indices_NK = torch.empty(tokens, chosen, dtype=torch.int64)
    scores_NE = torch.empty(tokens, number)
    failure = native.luciola_moe(
        y_ND.data_ptr(), indices_NK.data_ptr(), scores_NE.data_ptr(), x_ND.data_ptr(), x_ND.stride(0), tokens, hidden,
        scale.data_ptr(), norm.eps, W_gate.data_ptr(), W_gate.dtype is torch.bfloat16,
        gate.e_score_correction_bias.data_ptr() if biased else None,
        W_gate_up.data_ptr(), W_down.data_ptr(), W_down.dtype is torch.bfloat16, inner,
        *([x.data_ptr() for x in of_shared] or (None, None, None)),
        bool(of_shared) and of_shared[0].dtype is torch.bfloat16, of_shared[0].shape[0] if of_shared else 0,
        number, chosen, 1 if config.topk_method == "greedy" else config.n_group, config.topk_group, sigmoid, biased,
        config.norm_topk_prob and (sigmoid or chosen > 1), config.routed_scaling_factor,
    )  # fmt: skip
    if failure:
        raise MemoryError(f"no memory for the scratch space of {tokens} tokens and {number} experts; use fewer tokens")
    return y_ND, indices_NK, scores_NE


@torch.no_grad()
def moe_formula(x_ND: Tensor, layer: MoE, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
    """`moe` by the modules themselves."""
    y_BTD, routing = layer(norm(x_ND).unsqueeze(0))
    return x_ND + y_BTD[0], routing.indices_BTK[0], routing.scores_BTE[0]


def _weight(module: torch.nn.Module, name: str) -> Tensor:
    weight = module._modules[name].weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    return weight


def _served(x_ND: Tensor, experts: tuple[Tensor, ...], shared: tuple[Tensor, ...], W_gate: Tensor) -> bool:
    """Whether the kernel takes these: float32 tokens on the CPU, weights without gaps and each kind of one type."""
    return (
        x_ND.dtype is torch.float32
        and x_ND.is_cpu
        and x_ND.stride(1) == 1
        and all(
            kind[0].dtype in READ and all(x.dtype is kind[0].dtype and x.is_contiguous() for x in kind)
            for kind in (experts, shared, (W_gate,))
            if kind
        )
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The kernel with the types of its arguments set."""
    native = library()
    if native is None:
        return None
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    native.luciola_moe.argtypes = [
        *(pointer, pointer, pointer, pointer, size, size, size, pointer, real, pointer, flag, pointer),
        *(pointer, pointer, flag, size, pointer, pointer, pointer, flag, size),
        *(size, size, size, size, flag, flag, flag, real),
    ]
    return native
