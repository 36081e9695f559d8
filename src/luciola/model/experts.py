"""The routed experts of a layer as one differentiable operation over tokens sorted by expert.

Each token goes to K of E SwiGLU experts; y = sum_k w_k * down_k(silu(gate_k x) * up_k x). Sorting the N*K assignments
by expert makes each expert's work one dense product over its own rows. Forward and backward are written out because
autograd on slices of the stacked weights would fill a zero gradient of the full stack for every expert, and because the
weighted sum over K and its gradient are then single gather-and-add passes.

Shapes: N tokens, K experts a token, E experts, M = N*K assignments in expert order, D hidden, I inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _gather_sum(y_MD: Tensor, place_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """out_n = sum over k of weights_nk * y[place_nk], in one pass without an (N, K, D) intermediate."""
    return F.embedding_bag(place_NK, y_MD, mode="sum", per_sample_weights=weights_NK)


class _ExpertsFunction(torch.autograd.Function):
    """One expert after the other, from gathering its tokens to its last product, so that what passes between the steps
    stays in the processor's cache. Kept for the backward pass: the input and h, of which all else is made again."""

    @staticmethod
    def forward(ctx, x_ND, weights_NK, indices_NK, W_gate_up_EJD, W_down_EDI):  # type: ignore[no-untyped-def]
        N, K = indices_NK.shape
        E, J, D = W_gate_up_EJD.shape
        expert_M, order_M = indices_NK.flatten().sort(stable=True)
        counts = torch.bincount(expert_M, minlength=E).tolist()
        place_NK = torch.empty_like(order_M)
        place_NK[order_M] = torch.arange(N * K, device=order_M.device)
        place_NK = place_NK.view(N, K)
        token_M = order_M.div_(K, rounding_mode="floor")

        h_MJ, y_MD = x_ND.new_empty(N * K, J), x_ND.new_empty(N * K, D)
        work = zip(
            token_M.split(counts), h_MJ.split(counts), y_MD.split(counts), W_gate_up_EJD, W_down_EDI, strict=True
        )
        for token, h, y, W_gate_up_JD, W_down_DI in work:
            if len(token):
                torch.mm(x_ND.index_select(0, token), W_gate_up_JD.T, out=h)
                gate, up = h.chunk(2, dim=-1)
                torch.mm(F.silu(gate).mul_(up), W_down_DI.T, out=y)
        ctx.counts = counts
        ctx.save_for_backward(x_ND, h_MJ, weights_NK, token_M, place_NK, W_gate_up_EJD, W_down_EDI)
        return _gather_sum(y_MD, place_NK, weights_NK.to(y_MD.dtype))

    @staticmethod
    def backward(ctx, g_ND):  # type: ignore[no-untyped-def]
        x_ND, h_MJ, weights_NK, token_M, place_NK, W_gate_up_EJD, W_down_EDI = ctx.saved_tensors
        counts, inner = ctx.counts, W_down_EDI.shape[2]
        weight_M1 = weights_NK.new_empty(weights_NK.numel(), 1)
        weight_M1[place_NK.flatten()] = weights_NK.reshape(-1, 1)
        weight_M1 = weight_M1.to(g_ND.dtype)
        dW_gate_up_EJD, dW_down_EDI = torch.empty_like(W_gate_up_EJD), torch.empty_like(W_down_EDI)
        dx_MD, dweight_M = x_ND.new_empty(len(token_M), x_ND.shape[1]), g_ND.new_empty(len(token_M))
        of_tokens = (x.split(counts) for x in (token_M, h_MJ, weight_M1, dx_MD, dweight_M))
        of_weights = (W_gate_up_EJD, W_down_EDI, dW_gate_up_EJD, dW_down_EDI)
        for token, h, w, dx, dweight, W_gate_up_JD, W_down_DI, dW_gate_up_JD, dW_down_DI in zip(
            *of_tokens, *of_weights, strict=True
        ):
            if not len(token):
                dW_gate_up_JD.zero_()
                dW_down_DI.zero_()
                continue
            g, (gate, up) = g_ND.index_select(0, token), h.chunk(2, dim=-1)
            s = F.silu(gate)
            a = s * up
            da = torch.mm(g, W_down_DI)  # of the output before its weight; times a: the weight's own gradient
            torch.sum(da * a, dim=-1, out=dweight)
            torch.mm(g.T, a.mul_(w), out=dW_down_DI)
            da.mul_(w)
            dh = torch.empty_like(h)
            torch.mul(s, da, out=dh[:, inner:])
            dh[:, :inner] = torch.ops.aten.silu_backward(da.mul_(up), gate)
            torch.mm(dh.T, x_ND.index_select(0, token), out=dW_gate_up_JD)
            torch.mm(dh, W_gate_up_JD, out=dx)
        dx_ND = _gather_sum(dx_MD, place_NK, None)
        dweights_NK = dweight_M[place_NK].to(weights_NK.dtype)
        return dx_ND, dweights_NK, None, dW_gate_up_EJD, dW_down_EDI


class Experts(nn.Module):
    """E SwiGLU experts of inner width I, stacked: gate_up_proj (E, 2I, D), gate rows first, and down_proj (E, D, I)."""

    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, (N, D)."""
        y: Tensor = _ExpertsFunction.apply(x_ND, weights_NK, indices_NK, self.gate_up_proj, self.down_proj)
        return y
