"""Multi-head latent attention (DeepSeek-V2 paper, section 2.1; equations 9 to 19 there, 1 to 11 in the V3 report).

Keys and values of all heads are projections of one latent c a token. Only c and one rotated key k_R, shared by all
heads, are cached: kv_lora_rank + qk_rope_head_dim numbers a token and layer.

    c_Q = RMSNorm(W_DQ h)                    [q_C ; q_R] = W_UQ,QR c_Q       (without query compression: = W_Q h)
    [c ; k_R] = W_DKV,KR h                   c = RMSNorm(c),  q_R = RoPE(q_R),  k_R = RoPE(k_R)
    [k_C ; v] = W_UKV c                      o = softmax(scale * (q_C k_C + q_R k_R)) v,   u = W_O o

`forward` computes just that ("expanded"). `decode` uses q_C . (W_UK c) = (W_UK^T q_C) . c: the up-projection of keys is
absorbed into the query and that of values into the output, so that queries meet the cached latents directly and nothing
is ever expanded. It is multi-query attention whose one head is as wide as the cache.

Shapes: B batch, T time, S cached positions, D hidden, H heads, C = kv_lora_rank; n, r, v: widths of a head's part
without position, of its rotary part, of its value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luciola.model.attention import Context, Extend, attend
from luciola.model.config import ModelConfig
from luciola.model.joined import joined, weight_of
from luciola.model.native.attention import Step, mla_attend
from luciola.model.native.linear import Product
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rotation, rotate, turn

LATENT_EPS = 1e-6  # DeepSeek's code and the oracle fix it, whatever rms_norm_eps says


class _HeadsFunction(torch.autograd.Function):
    """q = [q_C ; RoPE(q_R)], k = [k_C ; k_R], v, heads before time: (B, H, T, width).

    Written out because autograd through the slices and concatenations would fill, copy and add each piece of every
    gradient several times over.
    """

    @staticmethod
    def forward(ctx, q_BTHx, kv_BTHx, kR_BTr, cos, sin, n, interleaved):  # type: ignore[no-untyped-def]
        q_BHTx, kv_BHTx, r = (
            q_BTHx.transpose(1, 2),
            kv_BTHx.transpose(1, 2),
            kR_BTr.shape[-1],
        )  # S where a past is cached
        ctx.rotation, ctx.n, ctx.interleaved = Rotation(cos, sin), n, interleaved
        qs, ks = (x.new_empty((*x.shape[:-1], n + r)) for x in (q_BHTx, kv_BHTx))
        qs[..., :n] = q_BHTx[..., :n]
        qs[..., n:] = turn(q_BHTx[..., n:], ctx.rotation, interleaved)
        ks[..., :n] = kv_BHTx[..., :n]
        ks[..., n:] = kR_BTr.unsqueeze(1)
        return qs, ks, kv_BHTx[..., n:].contiguous()

    @staticmethod
    def backward(ctx, dq_BHTx, dk_BHTx, dv_BHTv):  # type: ignore[no-untyped-def]
        n = ctx.n
        B, H, T, width = dq_BHTx.shape
        dq_BTHx = dq_BHTx.new_empty(B, T, H, width)
        dq_BTHx[..., :n] = dq_BHTx[..., :n].transpose(1, 2)
        dq_BTHx[..., n:] = turn(dq_BHTx[..., n:], ctx.rotation, ctx.interleaved, back=True).transpose(1, 2)
        dkv_BTHx = dk_BHTx.new_empty(B, T, H, n + dv_BHTv.shape[-1])
        dkv_BTHx[..., :n] = dk_BHTx[..., :n].transpose(1, 2)
        dkv_BTHx[..., n:] = dv_BHTv.transpose(1, 2)
        return dq_BTHx, dkv_BTHx, dk_BHTx[..., n:].sum(1), None, None, None, None


class MLA(nn.Module):
    """Multi-head latent attention with decoupled rotary keys; query compression where q_lora_rank is set."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        rank, heads, hidden, bias = (
            config.kv_lora_rank,
            config.num_attention_heads,
            config.hidden_size,
            config.attention_bias,
        )
        assert n is not None and r is not None and v is not None and rank is not None  # ModelConfig has checked it
        self.heads, self.rank, self.n, self.r, self.v = heads, rank, n, r, v
        self.scale, self.interleaved = config.attention_scale, config.rope_interleave
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (n + r), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (n + r), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + r, bias=bias)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(rank, heads * (n + v), bias=False)
        self.o_proj = nn.Linear(heads * v, hidden, bias=bias)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        compressed = hasattr(self, "q_a_proj")
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))) if compressed else self.q_proj(x_BTD)
        return q.unflatten(-1, (self.heads, self.n + self.r))  # type: ignore[no-any-return]

    def _latents(self, x_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        c_BTC, kR_BTr = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.r), dim=-1)
        return self.kv_a_layernorm(c_BTC), rotate(kR_BTr, rotation, self.interleaved)

    def forward(self, x_BTD: Tensor, context: Context, extend: Extend | None = None) -> Tensor:
        """Whole sequences, or the next tokens of sequences whose past `extend` adds, expanded. What is cached of a
        token is [c ; k_R]."""
        q_BTHx = self._queries(x_BTD)
        c_BTC, kR_BTr = self._latents(x_BTD, context.rotation)
        if extend is not None:
            c_BTC, kR_BTr = extend(torch.cat((c_BTC, kR_BTr), dim=-1)).split((self.rank, self.r), dim=-1)
        kv_BTHx = self.kv_b_proj(c_BTC).unflatten(-1, (self.heads, self.n + self.v))
        q_BHTx, k_BHTx, v_BHTv = _HeadsFunction.apply(
            q_BTHx, kv_BTHx, kR_BTr, *context.rotation, self.n, self.interleaved
        )
        o_BTHv = attend(q_BHTx, k_BHTx, v_BHTv, self.scale, context)
        return self.o_proj(o_BTHv.flatten(2))  # type: ignore[no-any-return]

    def prepare(self, norm: RMSNorm) -> None:
        """Make ready for `decode`, where `norm` comes before the attention."""
        compressed = hasattr(self, "q_a_proj")
        self.inputs = joined([self.q_a_proj if compressed else self.q_proj, self.kv_a_proj_with_mqa], norm)
        self.queries = Product(weight_of(self.q_b_proj), norm=self.q_a_layernorm) if compressed else None
        self.output = Product(weight_of(self.o_proj), self.o_proj.bias)

    def decode(self, x_ND: Tensor, step: Step, pool_PC: Tensor, exact: bool = False) -> Tensor:
        """x + the attention of norm(x) for N new tokens, absorbed; their [c ; k_R] go into the cache first."""
        q_Nx, ckR_NC = self.inputs(x_ND, exact=exact).tensor_split([-self.rank - self.r], dim=-1)
        if self.queries is not None:
            q_Nx = self.queries(q_Nx, exact=exact)
        o_Nx = mla_attend(
            q_Nx.unflatten(-1, (self.heads, self.n + self.r)),
            ckR_NC,
            self.kv_a_layernorm,
            self.kv_b_proj.weight,
            pool_PC,
            step,
            scale=self.scale,
            interleaved=self.interleaved,
            nope=self.n,
            rope=self.r,
            v=self.v,
        )
        return self.output(o_Nx, x_ND, exact=exact)
