"""Native mixture of experts: the kernel agrees with the modules and chooses as the gate does; no bit of a token's
result depends on what else is in the step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.moe import MoE
from luciola.model.native.build import library
from luciola.model.native.experts import moe, moe_formula
from luciola.model.norm import RMSNorm

needs_kernels = pytest.mark.skipif(library() is None, reason="no C compiler")
SIZES = {"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "kv_lora_rank": 4}
SIZES |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
V3 = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16, "num_experts_per_tok": 4}
V3 |= {"model_type": "deepseek_v3", "n_shared_experts": 1, "n_group": 4, "topk_group": 2}


def layer_of(seed: int, **sizes: Any) -> tuple[MoE, RMSNorm]:
    """A layer of random weights that keep the size of what passes through, and its norm."""
    config = ModelConfig.model_validate(SIZES | sizes)
    layer, norm = MoE(config), RMSNorm(config.hidden_size, 1e-5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*layer.state_dict().values(), norm.weight):
            x.copy_(torch.randn(x.shape, generator=generator) / (x.shape[-1] ** 0.5 if x.ndim > 1 else 1.0))
    return layer, norm


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    kept = draw(st.integers(1, groups))
    return {
        "model_type": draw(st.sampled_from(["deepseek_v2", "deepseek_v3"])),
        "hidden_size": draw(st.integers(1, 70)),
        "moe_intermediate_size": draw(st.integers(1, 50)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "n_routed_experts": groups * each,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, each * kept)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


@needs_kernels
@given(layers(), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 999))
@settings(max_examples=80, deadline=None, derandomize=True)
@torch.no_grad()
def test_the_kernel_computes_what_the_modules_do(
    sizes: dict[str, Any], count: int, dtype: torch.dtype, seed: int
) -> None:
    layer, norm = layer_of(seed, **sizes)
    x_ND, kept = tokens(count, sizes["hidden_size"], seed), layer.to(dtype)
    y_ND, indices_NK, scores_NE = moe(x_ND, kept, norm)
    expected_ND, _, expected_NE = moe_formula(x_ND, layer.float(), norm)  # the same numbers, in float32
    torch.testing.assert_close(scores_NE, expected_NE, rtol=2e-6, atol=1e-6)
    choice_NK = layer.gate.choose(scores_NE)
    assert torch.equal(indices_NK.sort(-1).values, choice_NK.sort(-1).values)
    if torch.equal(layer.gate.choose(expected_NE).sort(-1).values, choice_NK.sort(-1).values):
        torch.testing.assert_close(y_ND, expected_ND, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy", "noaux_tc"])
@torch.no_grad()
def test_every_way_to_choose_is_the_gates(method: str) -> None:
    family = "deepseek_v3" if method == "noaux_tc" else "deepseek_v2"
    layer, norm = layer_of(1, **V3 | {"model_type": family, "topk_method": method})
    x_ND = tokens(200, 256)
    _, indices_NK, scores_NE = moe(x_ND, layer, norm)
    assert torch.equal(indices_NK.sort(-1).values, layer.gate.choose(scores_NE).sort(-1).values)


@needs_kernels
@torch.no_grad()
def test_of_equal_experts_as_many_are_chosen_as_the_gate_chooses() -> None:
    layer, norm = layer_of(2, **V3 | {"n_group": 1, "topk_group": 1})
    layer.gate.weight[1::2] = layer.gate.weight[::2]
    layer.gate.e_score_correction_bias.zero_()
    _, indices_NK, scores_NE = moe(tokens(50, 256), layer, norm)
    chosen_NK = layer.gate.choose(scores_NE)
    values_NK, expected_NK = (scores_NE.gather(1, i).sort(-1).values for i in (indices_NK, chosen_NK))
    assert torch.equal(values_NK, expected_NK)
    assert all(len(set(row)) == 4 for row in indices_NK.tolist())
    layer.gate.weight.zero_()
    _, indices_NK, _ = moe(tokens(3, 256), layer, norm)
    assert indices_NK.tolist() == [[0, 1, 2, 3]] * 3


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 50, "moe_intermediate_size": 21, "n_shared_experts": 0}])
@torch.no_grad()
def test_no_bit_depends_on_neighbours_or_threads(sizes: dict[str, Any]) -> None:
    layer, norm = layer_of(3, **V3 | sizes)
    x_ND, before = tokens(70, norm.weight.numel()), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            together = moe(x_ND, layer, norm)
            results += [together, moe(x_ND[:17], layer, norm)]
            alone = [moe(x_ND[n : n + 1], layer, norm) for n in range(70)]
            results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        for x, first in zip(result, results[0], strict=True):
            assert torch.equal(x, first[: len(x)])


@needs_kernels
@torch.no_grad()
def test_not_a_number_stays_with_its_token() -> None:
    layer, norm = layer_of(4, **V3)
    x_ND = tokens(5, 256)
    expected = moe(x_ND, layer, norm)[0]
    x_ND[2, 7] = torch.nan
    y_ND = moe(x_ND, layer, norm)[0]
    assert y_ND[2].isnan().all()
    assert torch.equal(y_ND[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@needs_kernels
@torch.no_grad()
def test_rows_may_stand_apart() -> None:
    layer, norm = layer_of(5, **V3)
    wide_NX = tokens(3, 300)
    assert torch.equal(moe(wide_NX[:, 20:276], layer, norm)[0], moe(wide_NX[:, 20:276].contiguous(), layer, norm)[0])


@torch.no_grad()
def test_the_formula_takes_weights_of_another_type_than_the_tokens() -> None:
    layer, norm = layer_of(6, **V3)
    _, _, scores_NE = moe_formula(tokens(3, 256), layer, norm)
    half_ND, _, half_NE = moe_formula(tokens(3, 256), layer.bfloat16(), norm)
    assert half_ND.dtype is half_NE.dtype is torch.float32
    torch.testing.assert_close(half_NE, scores_NE, rtol=0.05, atol=0.05)


@needs_kernels
@torch.no_grad()
def test_hidden_states_of_another_width_are_refused() -> None:
    layer, norm = layer_of(7, **V3)
    with pytest.raises(ValueError, match="x_ND: 200 numbers"):
        moe(tokens(3, 200), layer, norm)


def test_without_kernels_the_modules_run() -> None:
    program = """
import torch
from tests.model.test_native_experts import V3, layer_of, moe, moe_formula, tokens
from luciola.model.native.build import library
assert library() is None
layer, norm = layer_of(0, **V3)
for x, y in zip(moe(tokens(2, 256), layer, norm), moe_formula(tokens(2, 256), layer, norm)):
    assert torch.equal(x, y)
"""
    environment = os.environ | {"LUCIOLA_NATIVE": "0"}
    folder = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=folder, timeout=100)
