"""The whole model: what tokens can influence, what memory-saving must not change, and prefill with decode."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer

MLA: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 2, "initializer_range": 0.3,
}  # fmt: skip
GQA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": True,
}  # fmt: skip
BOTH = pytest.mark.parametrize("config", [MLA, GQA], ids=["mla", "gqa"])


def create(config: dict[str, Any], seed: int = 0) -> Transformer:
    model = Transformer(ModelConfig.model_validate(config))
    model.initialize(seed)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 23, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_the_same_seed_makes_the_same_model() -> None:
    a, b, c = create(MLA, 0).state_dict(), create(MLA, 0).state_dict(), create(MLA, 1).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    matrices = [name for name in a if a[name].ndim > 1]
    assert not any(torch.equal(a[name], c[name]) for name in matrices)
    assert all(0.2 < float(a[name].std()) < 0.4 for name in matrices)
    assert all(bool((a[name] == 1).all()) for name in a if name.endswith("norm.weight"))


@BOTH
@torch.no_grad()
def test_a_token_influences_itself_and_what_follows(config: dict[str, Any]) -> None:
    model, before = create(config), tokens(1, 12)
    after = before.clone()
    after[0, 5] = (after[0, 5] + 1) % 23
    changed = (model(before) - model(after)).abs().amax(-1)[0]
    assert float(changed[:5].max()) < 1e-5  # rounding only: experts multiply other sets of rows
    assert float(changed[5:].min()) > 1e-4


@given(st.sampled_from(["mla", "gqa"]), st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
@torch.no_grad()
def test_packed_documents_are_read_as_if_alone(kind: str, lengths: list[int], seed: int) -> None:
    """Their logits equal those of each document in a row of its own: nothing leaks, and positions start at 0."""
    model = create(MLA if kind == "mla" else GQA, seed)
    documents = [tokens(1, n, seed + i) for i, n in enumerate(lengths)]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    packed = model.lm_head(model.hidden(torch.cat(documents, dim=1), segments_BT=segments).states)
    alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


@BOTH
def test_activation_checkpointing_changes_memory_only(config: dict[str, Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = create(config)
        model.activation_checkpointing = checkpointing
        hidden = model.hidden(tokens(2, 9))
        loss = hidden.states.square().sum() + sum(r.scores_BTE.square().sum() for r in hidden.routings)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, saving = gradients
    assert plain.keys() == saving.keys()
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_replayed_routes_reproduce_the_states_and_teach_every_gate() -> None:
    model, batch = create(MLA), tokens(2, 9)
    hidden = model.hidden(batch)
    routes = torch.stack([r.indices_BTK for r in hidden.routings], dim=2).short()
    assert routes.shape == (2, 9, 2, 2)  # B, T, MoE layers, K
    with torch.no_grad():
        for layer in model.moe_layers:  # without replay the model would now choose other experts
            layer.gate.e_score_correction_bias += torch.randn(6, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(model.hidden(batch).states, hidden.states, atol=1e-3)
    again = model.hidden(batch, routes_BTLK=routes)
    assert torch.equal(again.states, hidden.states)
    again.states.square().sum().backward()
    assert all(float(layer.gate.weight.grad.abs().sum()) > 0 for layer in model.moe_layers)


def test_casting_keeps_logits_in_float32_and_gate_biases_exact() -> None:
    model = create(MLA)
    with torch.no_grad():
        model.moe_layers[0].gate.e_score_correction_bias += 0.001
        exact = model(tokens(2, 9))
        model.to(torch.bfloat16)
        rounded = model(tokens(2, 9))
    assert rounded.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    bias = model.moe_layers[0].gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, torch.full((6,), 0.001))
    agree = (rounded.argmax(-1) == exact.argmax(-1)).float().mean()
    assert float(agree) > 0.8


def test_a_tied_head_is_one_parameter() -> None:
    model = create(GQA)
    assert model.lm_head.weight is model.embed_tokens.weight
    untied = create(GQA | {"tie_word_embeddings": False})
    assert untied.num_parameters() - model.num_parameters() == 23 * 16
