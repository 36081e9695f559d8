"""Recorded calls give what calling anew gives, bit for bit, and what cannot be recorded is not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.native import build
from luciola.model.native.attention import Step
from luciola.model.native.linear import Product
from luciola.model.native.repeat import MOST_BYTES, Repeated
from luciola.model.quant_layers import quantize_model
from luciola.model.transformer import Transformer

BASE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_nextn_predict_layers": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SHAPES = {
    "MLA and experts": BASE | LATENT | EXPERTS | {"q_lora_rank": 40},
    "MLA without query compression": BASE | LATENT | {"q_lora_rank": None, "first_k_dense_replace": 3},
    "GQA": BASE | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "num_nextn_predict_layers": 0},
    "GQA with biases": BASE
    | {"model_type": "qwen2", "num_key_value_heads": 2, "head_dim": 16, "num_nextn_predict_layers": 0},
}

pytestmark = pytest.mark.skipif(build.library() is None, reason=f"no native kernels: {build.reason()}")


def model_of(name: str) -> Transformer:
    model = Transformer(ModelConfig.model_validate(SHAPES[name]))
    model.initialize(1)
    return model.requires_grad_(False)


def decoded(model: Transformer, N: int, again: dict[str, Repeated[Any]] | None) -> list[Tensor]:
    """States, experts and the module's states of four steps of N sequences that grow by a token each."""
    model.prepare()
    rotation = model.rope(64, torch.device("cpu"))
    rows_N = torch.arange(N, dtype=torch.int32)
    table_RM = torch.arange(N * 4, dtype=torch.int32).view(N, 4)
    pools = [torch.zeros(N * 64, model.config.cached_per_token_and_layer) for _ in range(4)]
    tokens_N = torch.zeros(N, dtype=torch.long)
    step = Step(rows_N, torch.zeros_like(rows_N), table_RM, 16, rotation.cos, rotation.sin, again, tokens_N)
    results = []
    for position in range(4):
        if position == 2:
            model.prepare()  # as another engine over the same model does
        step.positions_N.fill_(position)
        tokens_N.copy_((torch.arange(N) * 7 + position * 11) % 48)
        states_ND, routings, logits_NV = model.decode(step, pools, logits=position % 2 == 0)
        if logits_NV is not None:
            torch.testing.assert_close(logits_NV, model.head(states_ND))
            results.append(logits_NV.clone())
        results += [
            states_ND.clone(),
            *(r.indices_BTK.clone() for r in routings),
            *(r.scores_BTE.clone() for r in routings),
        ]
        if len(model.mtp):
            tokens_N.copy_((tokens_N + 1) % 48)
            results.append(model.mtp_decode(states_ND, step, pools[-1], logits=position > 1).clone())
    return results


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_a_repeated_step_is_the_step(name: str, N: int, bits: int | None) -> None:
    model = model_of(name)
    if bits is not None:
        model = quantize_model(model, bits)[0]
    again: dict[str, Repeated[Any]] = {}
    for ours, anew in zip(decoded(model, N, again), decoded(model, N, None), strict=True):
        assert torch.equal(ours, anew)
    assert again["logits"].usable or bits is not None  # quantised experts are modules of PyTorch


def test_weights_changed_in_place_are_seen() -> None:
    product = Product(weight := torch.randn(5, 20))
    repeated = Repeated(product)
    repeated(torch.ones(1, 20))
    weight.mul_(2)
    torch.testing.assert_close(repeated(torch.ones(1, 20)), weight.sum(1)[None])


def test_a_function_that_pytorch_has_a_part_in_is_called() -> None:
    product = Product(torch.randn(5, 20))
    repeated = Repeated(lambda x: product(x) + 1)
    for x in torch.randn(3, 1, 20):
        assert torch.equal(repeated(x), product(x) + 1)
    assert not repeated.usable


def test_so_is_one_without_native_calls() -> None:
    repeated = Repeated(lambda x: x.view(-1))
    for x in torch.randn(3, 1, 20):
        assert torch.equal(repeated(x), x.view(-1))


def test_much_memory_is_not_held() -> None:
    product = Product(torch.randn(MOST_BYTES // 8, 2))
    repeated = Repeated(product)
    for x in torch.randn(2, 3, 2):
        assert torch.equal(repeated(x), product(x))
    assert not repeated.usable


def test_a_call_that_fails_later_says_what_it_would_have_said() -> None:
    model = model_of("GQA")
    model.prepare()
    rotation = model.rope(64, torch.device("cpu"))
    positions_N, table_RM = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    pools = [torch.zeros(16, model.config.cached_per_token_and_layer) for _ in range(3)]
    row_N = torch.zeros(1, dtype=torch.int32)
    tokens_N = torch.zeros(1, dtype=torch.long)
    step = Step(row_N, positions_N, table_RM, 16, rotation.cos, rotation.sin, {}, tokens_N)
    with torch.inference_mode():
        model.decode(step, pools)
        positions_N.fill_(17)
        with pytest.raises(ValueError, match="lies outside the table"):
            model.decode(step, pools)
        positions_N.fill_(1)
        tokens_N.fill_(48)
        with pytest.raises(IndexError, match="outside the vocabulary of 48"):
            model.decode(step, pools)
