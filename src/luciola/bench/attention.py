"""Attention of whole sequences, forward and backward: the kernel that training runs and PyTorch's, by turns.

Rows of a language model's usual sizes, multi-head latent attention among them, and the completions of prompts, sixteen
each: there the kernel reads a prompt once, while PyTorch's must be given it written out sixteen times. `torch` is what
runs where there is no kernel: its fused one, or for short rows the formula in batched products, which is faster there.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from luciola import hardware
from luciola.bench.turns import Turn, compare, machine
from luciola.model import attention
from luciola.model.attention import Context, attend
from luciola.model.layout import Layout
from luciola.model.native.repeat import usable
from luciola.model.rope import Rotation

PEERS = ("torch",)
ROUNDS, WARMUP = 5, 1


class Case(NamedTuple):
    """Rows of so many tokens, and heads; a group's rows share their first `prompt` tokens."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    v_width: int
    prompt: int = 0
    group: int = 1


CASES = {
    "gqa_128_rows_of_80": Case(128, 80, 9, 3, 64, 64),
    "gqa_8_rows_of_512": Case(8, 512, 9, 3, 64, 64),
    "gqa_4_rows_of_1024": Case(4, 1024, 9, 3, 64, 64),
    "mla_8_rows_of_256": Case(8, 256, 8, 8, 48, 32),
    "mla_4_rows_of_512": Case(4, 512, 8, 8, 192, 128),
    "16_completions_of_16_prompts": Case(256, 120, 4, 2, 32, 32, prompt=56, group=16),
}


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Milliseconds of a forward and a backward pass for each case, ratios, and the arithmetic as a share of the peak.

    Raises:
        RuntimeError: there is no C compiler, and so no kernel.
    """
    if not usable(torch.zeros(1)):
        raise RuntimeError("there is no kernel to measure; `luciola doctor` says why")
    peak, result = hardware.gemm_peak("float32"), {}
    for name, case in CASES.items():
        turns = _turns(case, against)
        found = compare(turns, "luciola", against)
        result[name] = {key: found[key] for key in ("ratio", "ratio_lowest", "ratio_highest")}
        result[name] |= {f"{who}_ms": 1e3 * found[f"{who}_seconds"] for who in turns}
        result[name]["share_of_peak"] = _flops(case) / found["luciola_seconds"] / peak
    return {**result, "rounds": ROUNDS, "gemm_peak_gflops": peak / 1e9, **machine()}


def _turns(case: Case, against: str) -> dict[str, list[Turn]]:
    """Both in this process, for they share nothing but the numbers."""
    layout = _layout(case) if case.prompt else None
    B, T = (1, layout.N) if layout is not None else (case.rows, case.tokens)
    shapes = ((case.heads, case.width), (case.kv_heads, case.width), (case.kv_heads, case.v_width))
    q, k, v = (torch.randn(B, T, heads, width).transpose(1, 2).requires_grad_() for heads, width in shapes)
    context = Context(Rotation(torch.ones(0), torch.zeros(0)), layout=layout)
    g = torch.randn(B, T, case.heads, case.v_width)
    turns: dict[str, list[Turn]] = {"luciola": [], against: []}
    short = attention.SHORT
    try:
        for number in range(WARMUP + ROUNDS):
            for name in turns:
                attention.SHORT = short if name == "luciola" else 0
                began = time.perf_counter()
                torch.autograd.grad(attend(q, k, v, 0.1, context), (q, k, v), g)
                if number >= WARMUP:
                    turns[name].append(Turn(time.perf_counter() - began, None))
    finally:
        attention.SHORT = short
    return turns


def _layout(case: Case) -> Layout:
    rows, count, own = [], 0, case.tokens - case.prompt
    for row in range(case.rows):
        if row % case.group == 0:
            prompt = torch.arange(count, count + case.prompt)
            count += case.prompt
        rows.append(torch.cat((prompt, torch.arange(count, count + own))))
        count += own
    return Layout(rows)


def _flops(case: Case) -> float:
    """Of the two products forward and the five backward, which form the scores again, over what each query sees."""
    whole, prompt = case.tokens * (case.tokens + 1) / 2, case.prompt * (case.prompt + 1) / 2
    looks = case.rows * (whole - prompt) + case.rows / case.group * prompt
    return looks * case.heads * 2 * ((case.width + case.v_width) + (3 * case.width + 2 * case.v_width))
