"""Decoding at contexts of 8k and 32k tokens: MLA absorbed, MLA expanded anew each step, and MHA of as many heads.

A stack of four layers at DeepSeek-V2-Lite's proportions (16 heads of 128, latent of 512 + 64) with a small feed-forward
decodes one token a step; its cache is filled with random numbers, for what stands in it does not change the time. All
three kinds have the same hidden size, heads and feed-forward; the two of MLA have the same weights.

`stack_step` drives any attention of the signature `Attend`, so a new kernel is measured by giving it here.

Shapes: B batch, S cached positions, D hidden, H heads, C numbers of a token in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luciola import hardware
from luciola.bench.turns import Step as Turn
from luciola.bench.turns import compare, machine, median_seconds, take_turns
from luciola.model.attention import Step
from luciola.model.config import ModelConfig
from luciola.model.mla import MLA
from luciola.model.rope import turn as rotate_tokens
from luciola.model.transformer import Transformer

PEERS: tuple[str, ...] = ()
LENGTHS = (8192, 32_768)
ROUNDS, WARMUP = 7, 2

_STACK: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "max_position_embeddings": LENGTHS[-1],
    "initializer_range": 0.02,
}
SHAPES: dict[str, dict[str, Any]] = {
    "MLA": _STACK
    | {
        "model_type": "deepseek_v2",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "MHA": _STACK | {"model_type": "llama", "head_dim": 128},
}

Attend = Callable[[Any, Tensor, Step, Tensor], Tensor]  # (attention module, x_BD, step, cache_BSC) -> (B, D)


def run() -> dict[str, Any]:
    """Milliseconds a token of the three at each context, what absorbing gains, and the bytes each reads a token."""
    dtype = hardware.choose_dtype("auto")[0]
    result: dict[str, Any] = {}
    for length in LENGTHS:
        shared = {"length": length, "dtype": dtype}
        turns = take_turns(
            {name: (f"{__name__}:{name}", shared) for name in ("absorbed", "expanded", "mha")}, ROUNDS, WARMUP
        )
        result[f"at_{length}"] = {
            "milliseconds": {name: 1000 * median_seconds(taken) for name, taken in turns.items()},
            "absorbed_against_expanded": compare(turns, "absorbed", "expanded")["ratio"],
            "absorbed_against_mha": compare(turns, "absorbed", "mha")["ratio"],
            "cache_bytes": {name: taken[0].said for name, taken in turns.items()},
            "share_of_bandwidth": {
                name: turns[name][0].said / median_seconds(turns[name]) / hardware.bandwidth()
                for name in ("absorbed", "mha")
            },
        }
    return {**result, "dtype": dtype, "layers": _STACK["num_hidden_layers"], **machine()}


def absorbed(length: int, dtype: str) -> Turn:
    """MLA as the engine decodes."""
    return stack_step(SHAPES["MLA"], length, dtype, lambda attention, x, step, cache: attention.decode(x, step, cache))


def expanded(length: int, dtype: str) -> Turn:
    """MLA that makes all keys and values from the cached latents at each step."""
    return stack_step(SHAPES["MLA"], length, dtype, attend_expanded)


def mha(length: int, dtype: str) -> Turn:
    """Multi-head attention as the engine decodes."""
    return stack_step(SHAPES["MHA"], length, dtype, lambda attention, x, step, cache: attention.decode(x, step, cache))


def stack_step(shape: dict[str, Any], length: int, dtype: str, attend: Attend) -> Turn:
    """A step that decodes one token at position `length` - 1 through the stack; it returns the bytes of the cache."""
    hardware.keep_freed_memory()
    model = Transformer(ModelConfig.model_validate(shape))
    model.initialize(0)
    model.to(getattr(torch, dtype))
    caches = filled_caches(model, length)
    size = sum(cache.nbytes for cache in caches)

    def step() -> int:
        decode_token(model, length - 1, caches, attend)
        return size

    return step


def filled_caches(model: Transformer, length: int) -> list[Tensor]:
    """Caches (1, length, C) of small random numbers, one a layer."""
    weight, config = model.embed_tokens.weight, model.config
    generator = torch.Generator().manual_seed(1)
    shape = (1, length, config.cached_per_token_and_layer)
    return [
        torch.randn(shape, generator=generator, dtype=weight.dtype).mul_(0.5) for _ in range(config.num_hidden_layers)
    ]


@torch.inference_mode()
def decode_token(model: Transformer, position: int, caches: list[Tensor], attend: Attend) -> Tensor:
    """The states (1, D) of token 0 at `position`, which takes the caches' last column."""
    rotation = model.rope(position + 1, torch.device("cpu"), torch.tensor([[position]]))
    x_BD = model.embed_tokens(torch.zeros(1, dtype=torch.long))
    for block, cache_BSC in zip(model.layers, caches, strict=True):
        x_BD = x_BD + attend(block.self_attn, block.input_layernorm(x_BD), Step(rotation), cache_BSC)  # type: ignore[operator]
        x_BD = x_BD + block.mlp(block.post_attention_layernorm(x_BD))  # type: ignore[operator]
    states_BD: Tensor = model.norm(x_BD)
    return states_BD


def attend_expanded(attention: nn.Module, x_BD: Tensor, step: Step, cache_BSC: Tensor) -> Tensor:
    """MLA's equations as `forward` computes them, for one new token a row: k_C and v of every cached latent."""
    assert isinstance(attention, MLA)
    n, v, rank = attention.n, attention.v, attention.rank
    qC_BHn, qR_BHr = attention._queries(x_BD).split((n, attention.r), dim=-1)
    qR_BHr = rotate_tokens(qR_BHr.unsqueeze(2), step.rotation, attention.interleaved).squeeze(2)
    c_BTC, kR_BTr = attention._latents(x_BD.unsqueeze(1), step.rotation)
    cache_BSC[:, -1:] = torch.cat((c_BTC, kR_BTr), dim=-1)
    kC_BSHn, v_BSHv = attention.kv_b_proj(cache_BSC[..., :rank]).unflatten(-1, (-1, n + v)).split((n, v), dim=-1)
    kR_BSHr = cache_BSC[:, :, None, rank:].expand(-1, -1, attention.heads, -1)
    k_BHSx = torch.cat((kC_BSHn, kR_BSHr), dim=-1).transpose(1, 2)
    q_BH1x = torch.cat((qC_BHn, qR_BHr), dim=-1).unsqueeze(2)
    # the kernel on CPU is fast for values as wide as the keys, hence the padding
    v_BHSx = F.pad(v_BSHv, (0, k_BHSx.shape[-1] - v)).transpose(1, 2)
    o_BH1x = F.scaled_dot_product_attention(q_BH1x, k_BHSx, v_BHSx, scale=attention.scale)
    output_BD: Tensor = attention.o_proj(o_BH1x[:, :, 0, :v].flatten(1))
    return output_BD
