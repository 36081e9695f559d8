"""Grouped-query attention: the attention of DeepSeek LLM 67B, Llama, Mistral and Qwen (multi-head when every head has
its own key, as in DeepSeekMoE).

Qwen3 normalises each head's query and key before rotating them; Mistral 7B v0.1 and some Qwen layers look back only a
window of tokens.

Shapes: B batch, T time, S cached positions, D hidden, H query heads, G key-value heads, d features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luciola.model.attention import Context, Step, attend, attend_cache
from luciola.model.config import ModelConfig
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rotation, rotate


class GQA(nn.Module):
    """Causal self-attention in which num_attention_heads / num_key_value_heads queries share a key and a value."""

    def __init__(self, config: ModelConfig, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.rope_dim
        self.kv_heads = config.num_key_value_heads or self.heads
        self.scale, self.window = config.attention_scale, window
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias=config.output_bias)
        if config.family.qk_norm:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps)

    def _qkv(self, x_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, heads before time: (B, H, T, d), (B, G, T, d) twice."""
        q_BTHd = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.width))
        k_BTGd = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.width))
        v_BTGd = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.width))
        if hasattr(self, "q_norm"):
            q_BTHd, k_BTGd = self.q_norm(q_BTHd), self.k_norm(k_BTGd)
        q_BHTd, k_BGTd = (rotate(x.transpose(1, 2), rotation, False) for x in (q_BTHd, k_BTGd))
        return q_BHTd, k_BGTd, v_BTGd.transpose(1, 2)

    def forward(self, x_BTD: Tensor, context: Context, cache_BTC: Tensor | None = None) -> Tensor:
        """Whole sequences. Writes each token's keys and values (C = 2 G d numbers) into `cache_BTC` where it is
        given."""
        q_BHTd, k_BGTd, v_BGTd = self._qkv(x_BTD, context.rotation)
        if cache_BTC is not None:
            torch.cat([x.transpose(1, 2).flatten(2) for x in (k_BGTd, v_BGTd)], dim=-1, out=cache_BTC)
        o_BTHd = attend(q_BHTd, k_BGTd, v_BGTd, self.scale, context, self.window)
        return self.o_proj(o_BTHd.flatten(2))  # type: ignore[no-any-return]

    def decode(self, x_BD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
        """One new token a row: its keys and values go into the last column of `cache_BSC`, then it attends to all of
        them, or to the last `window` columns."""
        q_BH1d, k_BG1d, v_BG1d = self._qkv(x_BD.unsqueeze(1), step.rotation)
        cache_BS2Gd = cache_BSC.unflatten(-1, (2, self.kv_heads, self.width))
        cache_BS2Gd[:, -1, 0] = k_BG1d[:, :, 0]
        cache_BS2Gd[:, -1, 1] = v_BG1d[:, :, 0]
        q_BGRd, mask_BS = q_BH1d[:, :, 0].unflatten(1, (self.kv_heads, -1)), step.mask_BS
        if self.window is not None:
            cache_BS2Gd = cache_BS2Gd[:, -self.window :]
            mask_BS = None if mask_BS is None else mask_BS[:, -self.window :]
        o_BGRd = attend_cache(q_BGRd, cache_BS2Gd[:, :, 0], cache_BS2Gd[:, :, 1], self.scale, mask_BS)
        return self.o_proj(o_BGRd.flatten(1))  # type: ignore[no-any-return]
