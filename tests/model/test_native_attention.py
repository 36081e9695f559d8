"""Native attention: kernel, formula and the modules' own whole-sequence `forward` agree; no bit of a token's result
depends on what else is in the step."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from luciola.model.attention import Context
from luciola.model.config import ModelConfig
from luciola.model.gqa import GQA
from luciola.model.mla import MLA
from luciola.model.native.attention import Step, gqa_attend, gqa_formula, mla_attend, mla_formula
from luciola.model.native.build import library, reason
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rope, frequencies

needs_kernels = pytest.mark.skipif(library() is None, reason="no C compiler")


def angles(width: int, length: int = 4096) -> tuple[Tensor, Tensor]:
    f = 100.0 ** -(torch.arange(0, width, 2) / width)
    at = torch.arange(length)[:, None] * f
    return at.cos(), at.sin()


def step_of(lengths: list[int], new: list[int], block_size: int, width: int, slots: int, seed: int = 0) -> Step:
    """Sequences of `lengths` tokens whose last `new` are new, in blocks drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block_size) for length in lengths]
    drawn = torch.randperm(slots // block_size, generator=generator)[: sum(blocks)].int()
    table = torch.full((len(lengths), max(blocks)), -7, dtype=torch.int32)
    for row, some in enumerate(drawn.split(blocks)):
        table[row, : len(some)] = some
    rows = [row for row, count in enumerate(new) for _ in range(count)]
    positions = [p for length, count in zip(lengths, new, strict=True) for p in range(length - count, length)]
    return Step(torch.tensor(rows).int(), torch.tensor(positions).int(), table, block_size, *angles(width))


def fill(pool_PC: Tensor, step: Step, past: list[Tensor]) -> None:
    """Puts each sequence's past entries where the table says."""
    for row, entries_SC in enumerate(past):
        at = torch.arange(len(entries_SC))
        blocks = step.table_RM[row].long()[at // step.block_size]
        pool_PC[blocks * step.block_size + at % step.block_size] = entries_SC.to(pool_PC.dtype)


def one(step: Step, n: int) -> Step:
    return replace(step, rows_N=step.rows_N[n : n + 1], positions_N=step.positions_N[n : n + 1])


class Mla:
    """Random inputs of one shape for `mla_attend`."""

    def __init__(self, heads: int, rank: int, nope: int, rope: int, v: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.rank, self.nope, self.rope, self.v = heads, rank, nope, rope, v
        self.width, self.turned = rank + rope, rope
        self.norm = RMSNorm(rank)
        self.norm.weight.data = self.random(rank) + 1
        self.weight = self.random(heads * (nope + v), rank) / rank**0.5

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self.random(tokens, self.heads, self.nope + self.rope), self.random(tokens, self.width)

    def run(self, kernel: bool, x: tuple[Tensor, Tensor], pool_PC: Tensor, step: Step) -> Tensor:
        shape = {"nope": self.nope, "rope": self.rope, "v": self.v}
        attend = mla_attend if kernel else mla_formula
        return attend(*x, self.norm, self.weight, pool_PC, step, scale=0.2, interleaved=self.heads % 2 == 0, **shape)


class Gqa:
    """Random inputs of one shape for `gqa_attend`."""

    def __init__(self, heads: int, kv_heads: int, width: int, normed: bool, window: int | None, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.turned, self.window = heads, kv_heads, width, window
        self.width = 2 * kv_heads * width
        self.norms = [RMSNorm(width, 1e-5) if normed else None for _ in range(2)]
        for norm in filter(None, self.norms):
            norm.weight.data = self.random(width) + 1

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def inputs(self, tokens: int) -> tuple[Tensor]:
        return (self.random(tokens, (self.heads + 2 * self.kv_heads) * self.turned),)

    def run(self, kernel: bool, x: tuple[Tensor], pool_PC: Tensor, step: Step) -> Tensor:
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "width": self.turned, "window": self.window}
        return (gqa_attend if kernel else gqa_formula)(*x, *self.norms, pool_PC, step, scale=0.3, **shape)


CASES = [
    Mla(4, 96, 64, 32, 64), Mla(1, 20, 12, 6, 10), Mla(3, 33, 7, 2, 5), Mla(17, 48, 70, 16, 66),
    Mla(6, 512, 16, 64, 16), Mla(32, 140, 16, 8, 24), Gqa(9, 3, 64, False, None), Gqa(4, 4, 10, True, 5),
    Gqa(6, 2, 24, True, 70), Gqa(20, 1, 8, False, 600), Gqa(1, 1, 130, False, None),
]  # fmt: skip


def test_the_kernels_compile_where_a_compiler_is() -> None:
    assert "failed" not in reason()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_the_formula(case: Mla | Gqa, block_size: int, dtype: torch.dtype) -> None:
    lengths, new = [1, 63, 1100, 64, 65, 513], [1, 3, 2, 1, 65, 1]
    step = step_of(lengths, new, block_size, case.turned, 4096)
    pool_PC = torch.full((4096, case.width), torch.nan, dtype=dtype)  # what no sequence owns must not be looked at
    fill(pool_PC, step, [case.random(length, case.width) for length in lengths])
    x, other_PC = case.inputs(sum(new)), pool_PC.clone()
    got, expected = case.run(True, x, pool_PC, step), case.run(False, x, other_PC, step)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 if dtype is torch.float32 else 2e-3)
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(pool_PC, other_PC, equal_nan=True, **tolerance)


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_no_bit_depends_on_neighbours_threads_or_blocks(case: Mla | Gqa) -> None:
    lengths = [3, 700, 64, 1500, 17, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 600]
    past = [case.random(length, case.width) for length in lengths]
    x = case.inputs(17)
    results = []
    for block_size, seed, threads in [(16, 0, 1), (16, 0, 2), (16, 1, 2), (1, 2, 2), (64, 3, 1)]:
        step = step_of(lengths, [1] * 17, block_size, case.turned, 8192, seed)
        pool_PC = torch.zeros(8192, case.width)
        fill(pool_PC, step, past)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(case.run(True, x, pool_PC, step))
            results.append(
                torch.cat([case.run(True, tuple(a[n : n + 1] for a in x), pool_PC, one(step, n)) for n in range(17)])
            )
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_several_tokens_in_one_step_equal_one_after_the_other(case: Mla | Gqa) -> None:
    step = step_of([70, 9], [6, 9], 16, case.turned, 256)
    pool_PC = torch.zeros(256, case.width)
    fill(pool_PC, step, [case.random(64, case.width)])
    x, other_PC = case.inputs(15), pool_PC.clone()
    together = case.run(True, x, pool_PC, step)
    for n in range(15):
        alone = case.run(True, tuple(a[n : n + 1] for a in x), other_PC, one(step, n))
        assert torch.equal(alone[0], together[n])
    assert torch.equal(pool_PC, other_PC)


@needs_kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_sequences_may_share_the_blocks_of_their_beginning(case: Mla | Gqa) -> None:
    past = case.random(32, case.width)
    step = step_of([33, 33], [1, 1], 16, case.turned, 256)
    apart_PC, shared_PC = torch.zeros(256, case.width), torch.zeros(256, case.width)
    fill(apart_PC, step, [past, past])
    table_RM = step.table_RM.clone()
    table_RM[1, :2] = table_RM[0, :2]
    fill(shared_PC, step, [past])
    x = case.inputs(2)
    shared = case.run(True, x, shared_PC, replace(step, table_RM=table_RM))
    assert torch.equal(shared, case.run(True, x, apart_PC, step))


@needs_kernels
def test_rows_of_a_fused_projection_need_not_be_copied() -> None:
    case, step = Mla(4, 32, 12, 8, 16), step_of([5, 7], [1, 1], 16, 8, 64)
    fused_NX = case.random(2, 4 * 20 + 40)
    q_NHx, ckv_NC = fused_NX[:, :80].unflatten(1, (4, 20)), fused_NX[:, 80:]
    pools = torch.zeros(2, 64, 40)
    o = case.run(True, (q_NHx, ckv_NC), pools[0], step)
    assert torch.equal(o, case.run(True, (q_NHx.contiguous(), ckv_NC.contiguous()), pools[1], step))


@needs_kernels
def test_bfloat16_weights_are_read_as_they_are() -> None:
    case, step = Mla(4, 40, 12, 8, 18), step_of([5, 7], [1, 1], 16, 8, 64)
    x, pools = case.inputs(2), torch.zeros(2, 64, 48)
    case.weight = case.weight.bfloat16()
    o = case.run(True, x, pools[0], step)
    case.weight = case.weight.float()
    assert torch.equal(o, case.run(True, x, pools[1], step))


@needs_kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_not_a_number_is_not_swallowed(case: Mla | Gqa) -> None:
    step = step_of([5, 7], [1, 1], 16, case.turned, 64)
    pool_PC = torch.zeros(64, case.width)
    pool_PC[step.table_RM[0, 0] * 16 + 2] = torch.nan
    o = case.run(True, case.inputs(2), pool_PC, step)
    assert o[0].isnan().all() and o[1].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("field", ["rows_N", "positions_N", "table_RM"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_a_table_that_leads_outside_is_refused(case: Mla | Gqa, field: str) -> None:
    step = step_of([5, 7], [1, 1], 16, case.turned, 64)
    step = replace(step, **{field: torch.full_like(getattr(step, field), 100)})
    with pytest.raises(ValueError, match="outside the table"):
        case.run(True, case.inputs(2), torch.zeros(64, case.width), step)


@needs_kernels
@pytest.mark.parametrize("case", [CASES[0], CASES[5]])
def test_shapes_that_do_not_fit_are_refused(case: Mla | Gqa) -> None:
    step, x = step_of([5, 7], [1, 1], 16, case.turned, 64), case.inputs(2)
    for wrong in [step_of([5], [1], 16, case.turned, 64), step_of([5, 7], [1, 1], 16, case.turned + 2, 64)]:
        with pytest.raises(ValueError, match="of one layer and step"):
            case.run(True, x, torch.zeros(64, case.width), wrong)
    with pytest.raises(ValueError, match="of one layer and step"):
        case.run(True, x, torch.zeros(64, case.width + 1), step)


@pytest.mark.parametrize("field", ["rows_N", "positions_N", "table_RM", "cos"])
def test_a_step_of_other_types_is_refused(field: str) -> None:
    step = step_of([5, 7], [1, 1], 16, 8, 64)
    with pytest.raises(ValueError, match=rf"step.{field}: torch.float64 .* must be"):
        replace(step, **{field: getattr(step, field).double()})
    with pytest.raises(ValueError, match="same shape"):
        replace(step, rows_N=torch.zeros(3).int())


DECODERS = {
    "mla": {"q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    "gqa": {"num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("window", [None, 7])
def test_gqa_is_what_the_module_computes_over_the_whole_sequence(kernel: bool, window: int | None) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"model_type": "qwen3", "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64,
         "num_hidden_layers": 1, "vocab_size": 32, "max_position_embeddings": 128, **DECODERS["gqa"]}
    )  # fmt: skip
    module = GQA(config, window)
    x_BTD = torch.randn(2, 30, 48)
    with torch.no_grad():
        expected = module(x_BTD, Context(Rope(config)(30, x_BTD.device)))
        qkv_NX = torch.cat([p(x_BTD) for p in (module.q_proj, module.k_proj, module.v_proj)], dim=-1).flatten(0, 1)
    step = replace(step_of([30, 30], [30, 30], 4, 16, 128), **table(config))
    o = (gqa_attend if kernel else gqa_formula)(
        qkv_NX, module.q_norm, module.k_norm, torch.zeros(128, config.cached_per_token_and_layer), step,
        heads=4, kv_heads=2, width=16, scale=module.scale, window=window,
    )  # fmt: skip
    torch.testing.assert_close(module.o_proj(o).view_as(expected), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_mla_is_what_the_module_computes_over_the_whole_sequence(kernel: bool, interleaved: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"model_type": "deepseek_v3", "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3,
         "intermediate_size": 64, "num_hidden_layers": 1, "first_k_dense_replace": 1, "vocab_size": 32,
         "max_position_embeddings": 128, "rope_interleave": interleaved, **DECODERS["mla"]}
    )  # fmt: skip
    module = MLA(config)
    x_BTD = torch.randn(2, 30, 48)
    with torch.no_grad():
        expected = module(x_BTD, Context(Rope(config)(30, x_BTD.device)))
        q_NHx = module.q_proj(x_BTD).flatten(0, 1).unflatten(-1, (3, 24))
        ckv_NC = module.kv_a_proj_with_mqa(x_BTD).flatten(0, 1)
    step = replace(step_of([30, 30], [30, 30], 4, 8, 128), **table(config))
    o = (mla_attend if kernel else mla_formula)(
        q_NHx, ckv_NC, module.kv_a_layernorm, module.kv_b_proj.weight, torch.zeros(128, 32), step,
        scale=module.scale, interleaved=module.interleaved, nope=16, rope=8, v=12,
    )  # fmt: skip
    torch.testing.assert_close(module.o_proj(o).view_as(expected), expected, rtol=1e-5, atol=1e-5)


def table(config: ModelConfig) -> dict[str, Tensor]:
    f, factor = frequencies(config)
    at = torch.arange(128)[:, None] * f
    return {"cos": at.cos() * factor, "sin": at.sin() * factor}


def test_without_kernels_the_formula_runs() -> None:
    program = """
import torch
from luciola.model.native.attention import Step, gqa_attend, gqa_formula
from luciola.model.native.build import library, reason
assert library() is None
step = Step(*(torch.zeros(1).int() for _ in range(2)), torch.zeros(1, 1).int(), 4, torch.ones(4, 4), torch.zeros(4, 4))
x, pools = torch.randn(1, 32), torch.zeros(2, 4, 16)
shape = {"heads": 2, "kv_heads": 1, "width": 8, "scale": 1.0}
o = [f(x, None, None, p, step, **shape) for f, p in zip((gqa_attend, gqa_formula), pools)]
assert torch.equal(*o) and torch.equal(*pools)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "LUCIOLA_NATIVE": "0"}, timeout=100)
