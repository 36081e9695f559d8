"""Softmax attention over whole sequences and over a cache, for both kinds of attention module.

Shapes: B batch, T time, S cached positions, H query heads, G key-value heads, D features a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luciola.model.layout import Layout
from luciola.model.rope import Rotation


class Context(NamedTuple):
    """What a whole-sequence pass shares among all layers: the angles, the mask where it is not plainly causal, and the
    rows where tokens do not stand in rows already."""

    rotation: Rotation
    mask_BTT: Tensor | None = None
    layout: Layout | None = None


class Step(NamedTuple):
    """What one decoding step shares among all layers: the angles (B, 1, d/2), and which cached positions each row
    sees."""

    rotation: Rotation
    mask_BS: Tensor | None = None


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Causal mask (B, T, T), True where query t may see key s: the same document, not later (packed rows do not
    leak)."""
    length = segments_BT.shape[1]
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()


def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, scale: float, context: Context) -> Tensor:
    """Causal attention, or attention under the context's mask; returns (B, T, H, width of v).

    PyTorch's fused kernel on CPU wants one width for queries, keys and values; MLA's differ, so the narrower side is
    padded with zeros, which changes no product, and the result is cut back: half the time of the general path.
    """
    v_width, q_width = v_BTGD.shape[-1], q_BTHD.shape[-1]
    if v_width < q_width:
        v_BTGD = F.pad(v_BTGD, (0, q_width - v_width))
    elif v_width > q_width:
        q_BTHD, k_BTGD = (F.pad(x, (0, v_width - q_width)) for x in (q_BTHD, k_BTGD))
    layout, mask_BTT = context.layout, context.mask_BTT
    if layout is not None:
        q_BTHD, k_BTGD, v_BTGD = layout.spread(q_BTHD), layout.spread(k_BTGD), layout.spread(v_BTGD)
    repeats = q_BTHD.shape[2] // k_BTGD.shape[2]
    if repeats > 1:
        k_BTGD, v_BTGD = (x.repeat_interleave(repeats, dim=2) for x in (k_BTGD, v_BTGD))
    o_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTGD.transpose(1, 2),
        v_BTGD.transpose(1, 2),
        attn_mask=None if mask_BTT is None else mask_BTT.unsqueeze(1),
        is_causal=mask_BTT is None,
        scale=scale,
    )
    o_BTHD = o_BHTD.transpose(1, 2)[..., :v_width]
    return o_BTHD if layout is None else layout.collect(o_BTHD)


def attend_cache(q_BGRD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float, mask_BS: Tensor | None) -> Tensor:
    """One new token a row against the cache: R query heads share each of the G cached heads. Returns (B, G, R, D).

    The query heads of a group stand where the kernel expects time, so the cache is read once a group and never copied.
    """
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    return F.scaled_dot_product_attention(
        q_BGRD, k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2), attn_mask=mask, scale=scale
    )
