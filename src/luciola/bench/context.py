"""Decoding at contexts of 8k and 32k tokens: MLA absorbed, MLA expanded anew each step, and MHA of as many heads.

A stack of four layers at DeepSeek-V2-Lite's proportions (16 heads of 128, latent of 512 + 64) with a small feed-forward
decodes one token a step; its cache is filled with random numbers, for what stands in it does not change the time. All
three kinds have the same hidden size, heads and feed-forward; the two of MLA have the same weights.
"""

from __future__ import annotations

from typing import Any

import torch

from luciola import hardware
from luciola.bench.turns import Step as Work
from luciola.bench.turns import Turn, compare, machine, median_seconds, take_turns
from luciola.engine.cache import PagedCache, Piece, PromptCache
from luciola.engine.engine import BLOCK_SIZE
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import UniformStream
from luciola.engine.sequence import Sequence
from luciola.model.config import ModelConfig
from luciola.model.native.attention import Step
from luciola.model.transformer import Transformer

PEERS: tuple[str, ...] = ()
SHORT = 16
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


def run() -> dict[str, Any]:
    """Milliseconds a token of the three at each context, what absorbing gains, and the bytes each reads a token.

    `attention_against_mha` compares what each takes longer than at a context of SHORT tokens, where the weights are
    read and hardly anything else.
    """
    dtype = hardware.choose_dtype("auto")[0]
    short = _milliseconds(_turns(SHORT, dtype))
    result: dict[str, Any] = {f"at_{SHORT}": {"milliseconds": short}}
    for length in LENGTHS:
        turns = _turns(length, dtype)
        times = _milliseconds(turns)
        result[f"at_{length}"] = {
            "milliseconds": times,
            "absorbed_against_expanded": compare(turns, "absorbed", "expanded")["ratio"],
            "absorbed_against_mha": compare(turns, "absorbed", "mha")["ratio"],
            "attention_against_mha": (times["mha"] - short["mha"]) / (times["absorbed"] - short["absorbed"]),
            "cache_bytes": {name: taken[0].said for name, taken in turns.items()},
            "share_of_bandwidth": {
                name: turns[name][0].said / median_seconds(turns[name]) / hardware.bandwidth()
                for name in ("absorbed", "mha")
            },
        }
    return {**result, "dtype": dtype, "layers": _STACK["num_hidden_layers"], **machine()}


def _turns(length: int, dtype: str) -> dict[str, list[Turn]]:
    shared = {"length": length, "dtype": dtype}
    contenders = {name: (f"{__name__}:{name}", shared) for name in ("absorbed", "expanded", "mha")}
    return take_turns(contenders, ROUNDS, WARMUP)


def _milliseconds(turns: dict[str, list[Turn]]) -> dict[str, float]:
    return {name: 1000 * median_seconds(taken) for name, taken in turns.items()}


def absorbed(length: int, dtype: str) -> Work:
    """MLA as the engine decodes."""
    return _decoding("MLA", length, dtype)


def mha(length: int, dtype: str) -> Work:
    """Multi-head attention as the engine decodes."""
    return _decoding("MHA", length, dtype)


def expanded(length: int, dtype: str) -> Work:
    """MLA that makes keys and values of all cached latents at each step, as it does for a piece of a prompt."""
    model, cache, sequence = stack("MLA", length, dtype)
    token = torch.zeros(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def step() -> int:
        model.hidden(token, cache=PromptCache(cache, [Piece(sequence, length - 1, 1)], 1))
        return size(cache)

    return step


def _decoding(kind: str, length: int, dtype: str) -> Work:
    model, cache, _ = stack(kind, length, dtype)
    model.prepare()

    @torch.inference_mode()
    def step() -> int:
        model.decode(paged_step(model, cache, length - 1), cache.pools)
        return size(cache)

    return step


def stack(kind: str, length: int, dtype: str) -> tuple[Transformer, PagedCache, Sequence]:
    """A model, and a cache full of small random numbers that one sequence of `length` tokens holds."""
    hardware.keep_freed_memory()
    model = Transformer(ModelConfig.model_validate(SHAPES[kind]))
    model.initialize(0)
    model.to(getattr(torch, dtype))
    blocks, weight = -(-length // BLOCK_SIZE), model.embed_tokens.weight
    layers = model.config.num_hidden_layers
    cache = PagedCache(model.config, layers, blocks, BLOCK_SIZE, 1, weight.dtype, weight.device)
    generator = torch.Generator().manual_seed(1)
    for pool in cache.pools:
        pool.copy_(torch.randn(pool.shape, generator=generator).mul_(0.5))
    sequence = Sequence(
        prompt_length=length,
        params=SamplingParams(),
        index=0,
        max_tokens=1,
        tokens=[0] * length,
        stream=UniformStream(0, 0, [0]),
        order=(0, 0),
        blocks=list(range(blocks)),
        row=0,
    )
    cache.follow(sequence)
    return model, cache, sequence


def paged_step(model: Transformer, cache: PagedCache, position: int) -> Step:
    """One token of the only sequence, at `position`."""
    rotation = model.rope(position + 1, cache.device)
    row, at = (torch.tensor([x], dtype=torch.int32) for x in (0, position))
    token = torch.zeros(1, dtype=torch.long)
    return Step(row, at, cache.table_RM, cache.block_size, rotation.cos, rotation.sin, tokens_N=token)


def size(cache: PagedCache) -> int:
    """Bytes of all layers."""
    return sum(pool.nbytes for pool in cache.pools)
