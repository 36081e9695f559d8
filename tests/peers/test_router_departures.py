"""Where programs for the same weights route tokens differently, and that we do as DeepSeek's own inference code does.

DeepSeek's code for V3 leaves groups out by setting their experts to minus infinity. Its first code for training and
early releases of transformers set them to zero, which is more than a kept expert has whose affinity plus bias is
negative: such tokens went to a group that had just been left out. transformers 5 has minus infinity as well.

The router's product is taken in float32 here, in transformers, and in DeepSeek's code from V3.2 on; the demonstration
code of V3 took it in the weights' bfloat16, where affinities that differ by less than 2^-8 are equal.
"""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from luciola.model.config import ModelConfig
from luciola.model.moe import Gate

SHAPE: dict[str, Any] = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "moe_intermediate_size": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
}  # fmt: skip


def gate_of(family: str, **changes: Any) -> tuple[Gate, transformers.PretrainedConfig]:
    gate = Gate(ModelConfig.from_hf(SHAPE | {"model_type": family} | changes))
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    return gate, transformers.AutoConfig.for_model(family, **SHAPE | changes)


def test_a_group_left_out_stays_out_even_if_all_that_is_kept_is_negative() -> None:
    gate, config = gate_of("deepseek_v3")
    gate.e_score_correction_bias.copy_(torch.tensor([-2.0, -2.1, -1.9, -2.2, -3.0, -3.1, -3.2, -3.3]))
    theirs = DeepseekV3TopkRouter(config)
    theirs.load_state_dict({"weight": gate.weight, "e_score_correction_bias": gate.e_score_correction_bias})
    x_ND = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    scores_NE = gate.scores(x_ND)
    chosen_NK = gate.choose(scores_NE).sort(-1).values
    assert torch.equal(chosen_NK, theirs(x_ND)[2].sort(-1).values)

    biased_NGe = (scores_NE + gate.e_score_correction_bias).unflatten(-1, (4, 2))
    kept_NG = biased_NGe.sum(-1).topk(2, dim=-1).indices
    assert all(set((row // 2).tolist()) <= set(kept.tolist()) for row, kept in zip(chosen_NK, kept_NG, strict=True))

    left_out_NG1 = torch.ones(500, 4, 1, dtype=torch.bool).scatter(1, kept_NG.unsqueeze(-1), False)
    with_zero_NK = biased_NGe.masked_fill(left_out_NG1, 0.0).flatten(1).topk(3, dim=-1).indices
    assert not torch.equal(chosen_NK, with_zero_NK.sort(-1).values)


def test_softmax_affinities_are_positive_so_that_zero_leaves_v2_s_groups_out_as_well() -> None:
    gate, config = gate_of("deepseek_v2", topk_method="group_limited_greedy")
    theirs = DeepseekV2TopkRouter(config)
    theirs.load_state_dict({"weight": gate.weight})
    x_ND = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gate.choose(gate.scores(x_ND)).sort(-1).values, theirs(x_ND)[2].sort(-1).values)


def test_the_router_s_product_is_float32_whatever_the_weights_are() -> None:
    gate, _ = gate_of("deepseek_v3")
    gate = gate.to(torch.bfloat16)
    x_ND = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scores_NE = gate.scores(x_ND)
    assert scores_NE.dtype == torch.float32
    assert torch.equal(scores_NE, F.linear(x_ND.float(), gate.weight.float()).sigmoid())
    in_half_NE = F.linear(x_ND, gate.weight).sigmoid().float()
    assert not torch.equal(gate.choose(scores_NE).sort(-1).values, gate.choose(in_half_NE).sort(-1).values)


def test_v2_either_normalises_or_scales_the_weights_where_transformers_only_scales() -> None:
    """DeepSeek's code for V2 divides by the sum if norm_topk_prob says so and more than one expert is chosen, else it
    multiplies by routed_scaling_factor; no published model sets norm_topk_prob."""
    x_ND = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    for chosen, normalised in ((3, True), (3, False), (1, True)):
        changes = {"norm_topk_prob": normalised, "num_experts_per_tok": chosen, "routed_scaling_factor": 16.0}
        gate, config = gate_of("deepseek_v2", topk_method="greedy", **changes)
        theirs = DeepseekV2TopkRouter(config)
        theirs.load_state_dict({"weight": gate.weight})
        scores_NE = gate.scores(x_ND)
        ours_N = gate.weigh(scores_NE, gate.choose(scores_NE)).sum(-1)
        if normalised and chosen > 1:
            torch.testing.assert_close(ours_N, torch.ones(50))
            assert theirs(x_ND)[1].sum(-1).min() > 8.0
        else:
            torch.testing.assert_close(ours_N, theirs(x_ND)[1].sum(-1))
