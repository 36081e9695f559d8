"""The gates of V2 (paper, section 2.1.2) and V3 (report, section 2.1.2), and layers whose routes are replayed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.moe import Gate, MoE

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = {"vocab_size": 8, "hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SIZES |= {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "moe_intermediate_size": 5}


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)


def gate_of(seed: int, **settings: Any) -> Gate:
    gate = Gate(ModelConfig.model_validate(SIZES | settings))
    randomize(gate, seed)
    return gate


def tokens(seed: int, count: int = 50) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@st.composite
def experts(draw: st.DrawFn) -> dict[str, Any]:
    """From one expert to several groups of several."""
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    return {
        "n_routed_experts": groups * each,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, each * kept)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 16.0])),
    }


def best(values: Tensor, k: int) -> set[int]:
    return set(values.argsort(descending=True)[:k].tolist())


def groups_kept(choice_E: Tensor, gate: Gate, score_of_group: int) -> list[int]:
    """Experts in the topk_group groups whose `score_of_group` best experts have the largest sum."""
    config = gate.config
    groups = choice_E.unflatten(0, (config.n_group, -1))
    sums = torch.stack([group.sort(descending=True).values[:score_of_group].sum() for group in groups])
    kept = best(sums, config.topk_group)
    each = groups.shape[1]
    return [e for e in range(len(choice_E)) if e // each in kept]


@given(experts(), st.integers(0, 999))
@SETTINGS
def test_v3_chooses_by_score_plus_bias_and_weighs_by_score_alone(sizes: dict[str, Any], seed: int) -> None:
    gate = gate_of(seed, **sizes)
    gate.e_score_correction_bias -= 1.0  # so that most sums are negative: excluded groups must lose all the same
    x = tokens(seed)
    scores = gate.scores(x)
    torch.testing.assert_close(scores, torch.sigmoid(x @ gate.weight.T))
    indices = gate.choose(scores)
    weights = gate.weigh(scores, indices)
    K = gate.config.num_experts_per_tok
    for s, chosen, weight in zip(scores, indices, weights, strict=True):
        z = s + gate.e_score_correction_bias
        allowed = groups_kept(z, gate, 2)
        limited = torch.full_like(z, -torch.inf)
        limited[allowed] = z[allowed]
        assert set(chosen.tolist()) == best(limited, K)
        assert len(set(chosen.tolist())) == K
        torch.testing.assert_close(weight, gate.config.routed_scaling_factor * s[chosen] / s[chosen].sum())
    torch.testing.assert_close(weights.sum(-1), torch.full((len(x),), gate.config.routed_scaling_factor))


@given(experts(), st.sampled_from(["greedy", "group_limited_greedy"]), st.integers(0, 999))
@SETTINGS
def test_v2_weighs_by_softmax_without_renormalising(sizes: dict[str, Any], method: str, seed: int) -> None:
    gate = gate_of(seed, model_type="deepseek_v2", topk_method=method, **sizes)
    assert not hasattr(gate, "e_score_correction_bias")
    x = tokens(seed)
    scores = gate.scores(x)
    torch.testing.assert_close(scores, torch.softmax(x @ gate.weight.T, dim=-1))
    indices = gate.choose(scores)
    for s, chosen in zip(scores, indices, strict=True):
        allowed = groups_kept(s, gate, 1) if method == "group_limited_greedy" else list(range(len(s)))
        limited = torch.zeros_like(s)
        limited[allowed] = s[allowed]
        assert set(chosen.tolist()) == best(limited, gate.config.num_experts_per_tok)
    factor = gate.config.routed_scaling_factor
    torch.testing.assert_close(gate.weigh(scores, indices), scores.gather(1, indices) * factor)


@given(experts(), st.floats(-5, 5), st.integers(0, 999))
@SETTINGS
def test_the_same_shift_of_every_bias_changes_nothing(sizes: dict[str, Any], shift: float, seed: int) -> None:
    """False for gates that fill excluded experts with 0 instead of minus infinity."""
    gate, x = gate_of(seed, **sizes), tokens(seed)
    scores = gate.scores(x).double()  # rounding must not decide a tie
    gate.e_score_correction_bias = gate.e_score_correction_bias.double()
    before = gate.choose(scores).sort().values
    gate.e_score_correction_bias += shift
    assert torch.equal(gate.choose(scores).sort().values, before)


def test_a_raised_bias_draws_tokens_but_not_weight() -> None:
    gate, x = gate_of(0, n_routed_experts=8, num_experts_per_tok=2, norm_topk_prob=False), tokens(0)
    scores = gate.scores(x)
    before = gate.choose(scores)
    gate.e_score_correction_bias[3] += 10.0
    after = gate.choose(scores)
    assert not bool((before == 3).any(1).all())
    assert bool((after == 3).any(1).all())
    torch.testing.assert_close(gate.weigh(scores, after), scores.gather(1, after))


def test_no_gradient_reaches_the_bias_and_every_score_gets_one() -> None:
    gate, x = gate_of(0, n_routed_experts=4, num_experts_per_tok=2), tokens(0)
    scores = gate.scores(x)
    gate.weigh(scores, gate.choose(scores)).square().sum().backward()
    assert gate.weight.grad is not None
    assert bool((gate.weight.grad.abs().sum(1) > 0).all())
    assert [name for name, _ in gate.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_bias_and_gate_arithmetic_in_float32(dtype: torch.dtype) -> None:
    gate, x = gate_of(0, n_routed_experts=8, num_experts_per_tok=2), tokens(0)
    gate.e_score_correction_bias += 0.001
    bias = gate.e_score_correction_bias.clone()
    gate.to(dtype)
    assert gate.weight.dtype == dtype
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, bias)
    assert gate.scores(x.to(dtype)).dtype == torch.float32


def test_a_gate_on_the_meta_device_gets_memory_for_its_bias() -> None:
    with torch.device("meta"):
        gate = Gate(ModelConfig.model_validate(SIZES | {"n_routed_experts": 4, "num_experts_per_tok": 2}))
    gate.to_empty(device="cpu")
    assert gate.e_score_correction_bias.device.type == "cpu"
    assert gate.e_score_correction_bias.dtype == torch.float32


def layer(seed: int, **sizes: Any) -> MoE:
    moe = MoE(ModelConfig.model_validate(SIZES | {"n_shared_experts": 1} | sizes))
    randomize(moe, seed)
    return moe


@given(experts(), st.sampled_from(["deepseek_v2", "deepseek_v3"]), st.integers(0, 2), st.integers(0, 999))
@SETTINGS
@torch.no_grad()
def test_a_layer_is_shared_plus_weighted_routed_experts(
    sizes: dict[str, Any], family: str, shared: int, seed: int
) -> None:
    moe = layer(seed, model_type=family, n_shared_experts=shared, **sizes)
    x = tokens(seed, 14).view(2, 7, 6)
    y, routing = moe(x)
    weights = moe.gate.weigh(routing.scores_BTE, routing.indices_BTK)
    expected = moe.shared_experts(x) if shared else torch.zeros_like(x)
    for b in range(2):
        for t in range(7):
            for expert, weight in zip(routing.indices_BTK[b, t].tolist(), weights[b, t], strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ x[b, t]).chunk(2)
                expected[b, t] += weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_replayed_routes_repeat_the_layer_and_still_teach_the_gate() -> None:
    moe, x = layer(0, n_routed_experts=8, num_experts_per_tok=3), tokens(0, 14).view(2, 7, 6)
    y, routing = moe(x)
    again, replayed = moe(x, routing.indices_BTK.to(torch.int16))
    assert torch.equal(again, y)
    assert torch.equal(replayed.indices_BTK, routing.indices_BTK)

    moe.gate.e_score_correction_bias += torch.randn(8)  # would choose others; the replay does not
    moe.zero_grad()
    again, _ = moe(x, routing.indices_BTK)
    torch.testing.assert_close(again, y)
    again.square().sum().backward()
    assert float(moe.gate.weight.grad.abs().sum()) > 0
