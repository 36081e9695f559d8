"""Sizes of the published models to the last parameter, and configurations that are refused or travel unharmed."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from luciola.model.config import ModelConfig
from luciola.model.flops import forward_flops, training_flops
from luciola.model.transformer import Transformer

HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
V2: dict[str, Any] = HEADS | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
    "num_hidden_layers": 60, "num_attention_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "n_routed_experts": 160, "num_experts_per_tok": 6, "moe_intermediate_size": 1536,
    "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
}  # fmt: skip
V2_LITE: dict[str, Any] = HEADS | {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
}  # fmt: skip
V3: dict[str, Any] = HEADS | {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "first_k_dense_replace": 3,
    "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip


def on_paper(config: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        return Transformer(ModelConfig.from_hf(config))


@pytest.mark.parametrize(
    ("config", "total", "active", "embedding"),
    [
        (V2, 235_741_434_880, 21_375_800_320, 524_288_000),
        (V2_LITE, 15_706_484_224, 2_661_150_208, 209_715_200),
        # The spec's 671,026,419,200 and 37,552,297,472 count 58 * 256 router biases, which are buffers here.
        (V3, 671_026_404_352, 37_552_297_472 - 58 * 256, 926_679_040),
    ],
    ids=["V2", "V2-Lite", "V3"],
)
def test_parameters_of_the_published_models(config: dict[str, Any], total: int, active: int, embedding: int) -> None:
    model = on_paper(config)
    assert model.num_parameters() == total
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.num_parameters(active=True) == active
    assert model.embed_tokens.weight.numel() == model.lm_head.weight.numel() == embedding


def test_the_prediction_module_of_v3_is_counted_apart() -> None:
    """eh_proj, three norms of its own and a whole block: 11.61e9; the main model's count stays as it is."""
    with torch.device("meta"):
        small = V3 | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
        model = Transformer(ModelConfig.from_hf(small))
        plain = Transformer(ModelConfig.from_hf(small | {"num_nextn_predict_layers": 0}))
    assert model.num_parameters() == plain.num_parameters()
    block = 187_107_328 + 2 * 7168 + 11_320_164_608 - 256
    assert sum(p.numel() for p in model.mtp.parameters()) == 2 * 7168 * 7168 + 3 * 7168 + block


@pytest.mark.parametrize(("config", "numbers"), [(V2, 34_560), (V2_LITE, 15_552), (V3, 35_136)])
def test_numbers_cached_for_a_token(config: dict[str, Any], numbers: int) -> None:
    shape = ModelConfig.from_hf(config)
    assert shape.cached_per_token_and_layer * shape.num_hidden_layers == numbers


def test_training_flops_of_v3() -> None:
    """6 * active (without the input embedding) + 3 L n_h (d_h + d_r + d_v) T: 250.5e9 a token at T = 4096."""
    model = on_paper(V3)
    assert training_flops(model, 4096) == pytest.approx(250.5e9, rel=2e-4)
    assert forward_flops(model, 4096) * 3 == training_flops(model, 4096)


TINY: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
MOE = TINY | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 4}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (TINY | {"qk_rope_head_dim": 3}, "must be even"),
        (TINY | {"v_head_dim": None}, "v_head_dim is needed where kv_lora_rank is set"),
        (TINY | {"kv_lora_rank": None, "num_attention_heads": 3}, "set head_dim"),
        (TINY | {"kv_lora_rank": None, "num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        (TINY | {"num_experts_per_tok": 2}, "n_routed_experts is not"),
        (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size and num_experts_per_tok are needed"),
        (MOE | {"n_group": 3}, "does not divide over n_group=3"),
        (MOE | {"n_group": 2, "topk_group": 3}, "more than n_group=2"),
        (MOE | {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "more than the 2 experts"),
        (TINY | {"hidden_sise": 8}, "hidden_sise"),
    ],
)
def test_shapes_that_cannot_be_are_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ModelConfig.model_validate(config)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match="'mamba' is not supported; this version reads deepseek, deepseek_v2, deepseek_v3, llama, mistral",
    ):
        ModelConfig.from_hf(TINY | {"model_type": "mamba"})


@pytest.mark.parametrize("config", [V2, V2_LITE, V3, TINY | {"kv_lora_rank": None, "model_type": "llama"}])
def test_a_config_survives_the_way_to_hugging_face_and_back(config: dict[str, Any]) -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    for extra in ({}, {"rope_scaling": yarn | {"original_max_position_embeddings": 4096}}):
        shape = ModelConfig.from_hf(config | extra)
        again = ModelConfig.from_hf(shape.to_hf())
        assert again.to_hf() == shape.to_hf()
        with torch.device("meta"):
            few = {"num_hidden_layers": 2, "vocab_size": 8}
            ours, theirs = (Transformer(s.model_copy(update=few)).state_dict() for s in (shape, again))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        assert again.attention_scale == shape.attention_scale


def test_the_rope_dictionary_of_transformers_5_means_the_same_as_the_pair_of_4() -> None:
    yarn = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    yarn["original_max_position_embeddings"] = 4096
    old = ModelConfig.from_hf(V3 | {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", **yarn}})
    new = ModelConfig.from_hf(V3 | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **yarn}})
    assert old == new
    assert old.rope_theta == 5e4


def test_layers_with_experts() -> None:
    shape = ModelConfig.model_validate(MOE | {"num_hidden_layers": 6, "first_k_dense_replace": 2, "moe_layer_freq": 2})
    assert [shape.is_moe_layer(i) for i in range(7)] == [False, False, True, False, True, False, True]
