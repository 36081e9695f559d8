"""Grouped-query attention: the attention of DeepSeek LLM 67B, Llama, Mistral and Qwen (multi-head when every head has
its own key, as in DeepSeekMoE).

Qwen3 normalises each head's query and key before rotating them; Mistral 7B v0.1 and some Qwen layers look back only a
window of tokens.

Shapes: B batch, T time, S cached positions, D hidden, H query heads, G key-value heads, d features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luciola.model.attention import Context, Extend, attend
from luciola.model.config import ModelConfig
from luciola.model.joined import joined, weight_of
from luciola.model.native.attention import Step, gqa_attend
from luciola.model.native.linear import Product
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

    def forward(self, x_BTD: Tensor, context: Context, extend: Extend | None = None) -> Tensor:
        """Whole sequences, or the next tokens of sequences whose past `extend` adds. What is cached of a token are
        its keys and values, 2 G d numbers."""
        q_BHTd, k_BGTd, v_BGTd = self._qkv(x_BTD, context.rotation)
        if extend is not None:
            kv_BSC = extend(torch.cat([x.transpose(1, 2).flatten(2) for x in (k_BGTd, v_BGTd)], dim=-1))
            k_BGTd, v_BGTd = kv_BSC.unflatten(-1, (2, self.kv_heads, self.width)).permute(2, 0, 3, 1, 4)
        o_BTHd = attend(q_BHTd, k_BGTd, v_BGTd, self.scale, context, self.window)
        return self.o_proj(o_BTHd.flatten(2))  # type: ignore[no-any-return]

    def prepare(self, norm: RMSNorm) -> None:
        """Make ready for `decode`, where `norm` comes before the attention."""
        self.inputs = joined([self.q_proj, self.k_proj, self.v_proj], norm)
        self.output = Product(weight_of(self.o_proj), self.o_proj.bias)

    def decode(self, x_ND: Tensor, step: Step, pool_PC: Tensor, exact: bool = False) -> Tensor:
        """x + the attention of norm(x) for N new tokens; their keys and values go into the cache first."""
        o_Nx = gqa_attend(
            self.inputs(x_ND, exact=exact),
            getattr(self, "q_norm", None),
            getattr(self, "k_norm", None),
            pool_PC,
            step,
            heads=self.heads,
            kv_heads=self.kv_heads,
            width=self.width,
            scale=self.scale,
            window=self.window,
        )
        return self.output(o_Nx, x_ND, exact=exact)
