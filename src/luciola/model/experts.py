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
    @staticmethod
    def forward(ctx, x_ND, weights_NK, indices_NK, W_gate_up_EJD, W_down_EDI):  # type: ignore[no-untyped-def]
        N, K = indices_NK.shape
        E, J, D = W_gate_up_EJD.shape
        inner = J // 2
        expert_M, order_M = indices_NK.flatten().sort(stable=True)
        counts = torch.bincount(expert_M, minlength=E).tolist()
        place_NK = torch.empty_like(order_M)
        place_NK[order_M] = torch.arange(N * K, device=order_M.device)
        place_NK = place_NK.view(N, K)
        token_M = order_M.div_(K, rounding_mode="floor")

        x_MD = x_ND.index_select(0, token_M)
        h_MJ = x_MD.new_empty(N * K, J)
        a_MI = x_MD.new_empty(N * K, inner)
        y_MD = x_MD.new_empty(N * K, D)
        end = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(end, end := end + count)
                torch.mm(x_MD[rows], W_gate_up_EJD[expert].T, out=h_MJ[rows])
                torch.mul(F.silu(h_MJ[rows, :inner]), h_MJ[rows, inner:], out=a_MI[rows])
                torch.mm(a_MI[rows], W_down_EDI[expert].T, out=y_MD[rows])
        ctx.counts = counts
        ctx.save_for_backward(x_MD, h_MJ, a_MI, weights_NK, token_M, place_NK, W_gate_up_EJD, W_down_EDI)
        return _gather_sum(y_MD, place_NK, weights_NK.to(y_MD.dtype))

    @staticmethod
    def backward(ctx, g_ND):  # type: ignore[no-untyped-def]
        x_MD, h_MJ, a_MI, weights_NK, token_M, place_NK, W_gate_up_EJD, W_down_EDI = ctx.saved_tensors
        inner = a_MI.shape[1]
        weight_M1 = weights_NK.new_empty(weights_NK.numel(), 1)
        weight_M1[place_NK.flatten()] = weights_NK.reshape(-1, 1)
        weight_M1 = weight_M1.to(g_ND.dtype)
        dW_gate_up_EJD, dW_down_EDI = torch.empty_like(W_gate_up_EJD), torch.empty_like(W_down_EDI)
        dx_MD, dweight_M = torch.empty_like(x_MD), g_ND.new_empty(x_MD.shape[0])
        end = 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                dW_gate_up_EJD[expert].zero_()
                dW_down_EDI[expert].zero_()
                continue
            rows = slice(end, end := end + count)
            g, a, w = g_ND.index_select(0, token_M[rows]), a_MI[rows], weight_M1[rows]
            gate, up = h_MJ[rows].chunk(2, dim=-1)
            da = torch.mm(g, W_down_EDI[expert])  # of the output before its weight; times a: the weight's own gradient
            torch.sum(da * a, dim=-1, out=dweight_M[rows])
            torch.mm(g.T, a * w, out=dW_down_EDI[expert])
            da.mul_(w)
            dh = torch.empty_like(h_MJ[rows])
            torch.mul(F.silu(gate), da, out=dh[:, inner:])
            dh[:, :inner] = torch.ops.aten.silu_backward(da.mul_(up), gate)
            torch.mm(dh.T, x_MD[rows], out=dW_gate_up_EJD[expert])
            torch.mm(dh, W_gate_up_EJD[expert], out=dx_MD[rows])
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
