"""Softmax attention over whole sequences, or over pieces of them whose past is cached, for both kinds of attention
module. (New tokens, a few a sequence, go through `native.attention`.)

Shapes: B batch, T time, S keys: past and new ones, H query heads, G key-value heads, D features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.model.layout import Layout
from luciola.model.native import causal
from luciola.model.native.repeat import usable
from luciola.model.rope import Rotation

SHORT = 2048  # tokens of a row up to which the kernel of native.causal is the faster one
KEPT_NUMBERS = 1 << 23  # attention weights of a layer kept for the backward pass, 32 MiB at the most
BLOCK = 128  # queries of a block


class Context(NamedTuple):
    """What a whole-sequence pass shares among all layers: the angles, the first position that each token may see where
    rows hold several documents, and the rows where tokens do not stand in rows already."""

    rotation: Rotation
    begins_BT: Tensor | None = None
    layout: Layout | None = None


# What an attention module does with the cache entries (B, T, C) of new tokens: it hands them over to be kept, and gets
# past and new ones, (B, S, C).
Extend = Callable[[Tensor], Tensor]


class PromptCache(Protocol):
    """Where the entries of prompts are kept: `past` tokens of each row are there already."""

    past: int

    def extend(self, layer: int, entries_BTC: Tensor) -> Tensor:
        """Keep a layer's entries of the new tokens; returns past and new ones, (B, S, C)."""


def visible(T: int, S: int, device: torch.device, window: int | None = None, begins_BT: Tensor | None = None) -> Tensor:
    """(B or 1, T, S), True where a query may see a key: the T queries are the last of S tokens; keys that lie `window`
    tokens or more before a query, or before its `begins_BT`, are out of its sight."""
    seen_TS = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    seen_BTS = (seen_TS if window is None else seen_TS.triu(S - T + 1 - window)).unsqueeze(0)
    if begins_BT is None:
        return seen_BTS
    return seen_BTS & (torch.arange(S, device=device) >= begins_BT.unsqueeze(-1))


def attend(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float, context: Context, window: int | None = None
) -> Tensor:
    """Causal attention, of tokens that stand in rows or in the context's layout; returns (B, T, H, width of v).

    Where there are more keys than queries, the queries are those of the last tokens.

    With `window` a token sees itself and the window - 1 tokens before it (Mistral 7B, section 2).

    PyTorch's fused kernel serves long rows, GPUs, and precisions other than float32; `native.causal` the rest. Where
    there is no C compiler, the scores of all heads of short rows are formed at once.
    """
    layout, begins_BT = context.layout, context.begins_BT
    rows, longest = (len(k_BGSD), k_BGSD.shape[2]) if layout is None else (layout.families, layout.shape[1])
    busy = rows * k_BGSD.shape[1] >= torch.get_num_threads()
    if q_BHTD.shape[2] == k_BGSD.shape[2] and longest <= SHORT and busy and usable(q_BHTD, k_BGSD, v_BGSD):
        return causal.causal_attend(q_BHTD, k_BGSD, v_BGSD, scale, window, begins_BT, layout)
    if layout is not None:
        q_BHTD, k_BGSD, v_BGSD = layout.spread(q_BHTD), layout.spread(k_BGSD), layout.spread(v_BGSD)
    (B, H, T, _), S = q_BHTD.shape, k_BGSD.shape[2]
    near = window if window is not None and window < S else None
    mask_BTS = None
    if S > T or near is not None or begins_BT is not None:
        mask_BTS = visible(T, S, q_BHTD.device, near, begins_BT)
    if S == T and B * H * T * T <= KEPT_NUMBERS and q_BHTD.dtype == torch.float32 and q_BHTD.device.type == "cpu":
        o_BHTD = _ShortFunction.apply(q_BHTD, k_BGSD, v_BGSD, scale, mask_BTS)
    else:
        o_BHTD = _fused(q_BHTD, k_BGSD, v_BGSD, scale, mask_BTS)
    return o_BHTD.transpose(1, 2) if layout is None else layout.collect(o_BHTD)


def _fused(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float, mask_BTS: Tensor | None) -> Tensor:
    # The kernel on CPU wants one width for queries, keys and values; MLA's differ, so the narrower side is padded with
    # zeros, which changes no product, and the result is cut back: half the time of the general path.
    repeats, v_width, q_width = q_BHTD.shape[1] // k_BGSD.shape[1], v_BGSD.shape[-1], q_BHTD.shape[-1]
    if repeats > 1:
        k_BGSD, v_BGSD = (x.repeat_interleave(repeats, dim=1) for x in (k_BGSD, v_BGSD))
    if v_width < q_width:
        v_BGSD = F.pad(v_BGSD, (0, q_width - v_width))
    elif v_width > q_width:
        q_BHTD, k_BGSD = (F.pad(x, (0, v_width - q_width)) for x in (q_BHTD, k_BGSD))
    o_BHTD = F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
        is_causal=mask_BTS is None,
        scale=scale,
    )
    return o_BHTD[..., :v_width]


class _ShortFunction(torch.autograd.Function):
    """Softmax attention by blocks of queries, each against the keys up to its own end; the weights are kept.

    With P the weights and dO the gradient of the output: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)),
    dQ = dS K * scale, dK = dS^T Q * scale. The R = H / G query heads that share a key stand one below the other, as if
    they were further queries, so that keys are never repeated and their gradients add up in the product.

    Shapes: X = B*G batched products, t queries of a block, s keys up to its end.
    """

    @staticmethod
    def forward(ctx, q_BHTD, k_BGTD, v_BGTD, scale, mask_BTT):  # type: ignore[no-untyped-def]
        (B, H, T, _), G = q_BHTD.shape, k_BGTD.shape[1]
        q_XRTD = q_BHTD.reshape(B * G, H // G, T, -1)
        k_XTD, v_XTD = (x.flatten(0, 1) for x in (k_BGTD, v_BGTD))
        o_XRTD = v_XTD.new_empty(*q_XRTD.shape[:3], v_XTD.shape[-1])
        kept = []
        for start in range(0, T, BLOCK):
            end = min(T, start + BLOCK)
            rows = q_XRTD[:, :, start:end]
            bias_ts = q_BHTD.new_full((end - start, end), 0.0 if mask_BTT is not None else -torch.inf)
            bias_ts = bias_ts.triu_(start + 1).repeat(H // G, 1)  # repeat: one for each head of a group
            p_Xts = torch.baddbmm(bias_ts, rows.flatten(1, 2), k_XTD[:, :end].transpose(1, 2), alpha=scale)
            if mask_BTT is not None:
                unseen_B11ts = ~mask_BTT[:, None, None, start:end, :end]
                p_Xts.view(B, G, H // G, end - start, end).masked_fill_(unseen_B11ts, -torch.inf)
            torch.softmax(p_Xts, -1, out=p_Xts)
            o_XRTD[:, :, start:end] = torch.bmm(p_Xts, v_XTD[:, :end]).view(*rows.shape[:3], -1)
            kept.append(p_Xts)
        ctx.save_for_backward(q_XRTD, k_XTD, v_XTD, o_XRTD, *kept)
        ctx.scale, ctx.shape = scale, (B, G)
        return o_XRTD.view(B, H, T, -1)

    @staticmethod
    def backward(ctx, g_BHTD):  # type: ignore[no-untyped-def]
        q_XRTD, k_XTD, v_XTD, o_XRTD, *kept = ctx.saved_tensors
        g_XRTD = g_BHTD.reshape(o_XRTD.shape)
        minus_dot_XRT1 = (g_XRTD * o_XRTD).sum(-1, keepdim=True).neg_()
        dq_XRTD, dk_XTD, dv_XTD = (torch.empty_like(x) for x in (q_XRTD, k_XTD, v_XTD))
        T, scale = k_XTD.shape[1], ctx.scale
        for start in reversed(range(0, T, BLOCK)):  # the last block reaches all keys: the others add to what it leaves
            p_Xts = kept[start // BLOCK]
            end = min(T, start + BLOCK)
            q, g, minus_dot = (x[:, :, start:end].flatten(1, 2) for x in (q_XRTD, g_XRTD, minus_dot_XRT1))
            ds_Xts = torch.baddbmm(minus_dot, g, v_XTD[:, :end].transpose(1, 2)).mul_(p_Xts)
            dq = torch.baddbmm(q, ds_Xts, k_XTD[:, :end], beta=0, alpha=scale)
            dq_XRTD[:, :, start:end] = dq.view(*q_XRTD.shape[:2], end - start, -1)
            if end == T:
                torch.baddbmm(dk_XTD, ds_Xts.transpose(1, 2), q, beta=0, alpha=scale, out=dk_XTD)
                torch.bmm(p_Xts.transpose(1, 2), g, out=dv_XTD)
            else:
                dk_XTD[:, :end].add_(torch.bmm(ds_Xts.transpose(1, 2), q), alpha=scale)
                dv_XTD[:, :end].add_(torch.bmm(p_Xts.transpose(1, 2), g))
        B, G = ctx.shape
        dk_BGTD, dv_BGTD = (x.unflatten(0, (B, G)) for x in (dk_XTD, dv_XTD))
        return dq_XRTD.view(B, -1, T, dq_XRTD.shape[-1]), dk_BGTD, dv_BGTD, None, None
