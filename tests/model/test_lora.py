"""LoRA: W = W_0 + s B A, gradients by the chain rule, and nothing else of the model moves."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from luciola.model.language_model import LanguageModel
from luciola.model.lora import Lora, merged, scaling, targets, trained_parameters
from luciola.model.transformer import Transformer
from luciola.recipe import LoraSection, OptimSection
from luciola.train.optim import Optimizer

DENSE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
MOE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(1))


def model_of(shape: dict[str, Any]) -> Transformer:
    return LanguageModel.create(shape).model


def adapted(shape: dict[str, Any], seed: int = 3, **section: Any) -> tuple[Transformer, Lora]:
    """A model whose adapters do something already."""
    model = model_of(shape)
    lora = Lora(model, LoraSection(**({"rank": 2, "alpha": 3.0} | section)), 0, "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in lora.matrices.values():
            matrix.B_OR.normal_(generator=generator).mul_(0.1)
    lora.merge()
    return model, lora


def loss_of(model: Transformer) -> torch.Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_a_fresh_adapter_leaves_the_model_as_it_is(shape: dict[str, Any]) -> None:
    plain = model_of(shape)
    model = copy.deepcopy(plain)
    lora = Lora(model, LoraSection(rank=2), 0, "base")
    lora.merge()
    for (name, before), (_, after) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert all(matrix.A_RI.std() > 0 for matrix in lora.matrices.values())


@pytest.mark.parametrize("shape", [DENSE, MOE])
def test_gradients_are_those_of_the_formula_by_autograd(shape: dict[str, Any]) -> None:
    model, lora = adapted(shape, rslora=shape is MOE)
    loss_of(model).backward()
    plain = model_of(shape).requires_grad_(False)
    state = {name: x.requires_grad_() for name, x in lora.state().items()}
    weights = {
        f"{name}.weight": m.W0_OI + lora.scale * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        for name, m in lora.matrices.items()
    }
    logits = torch.func.functional_call(plain, weights, (TOKENS[:, :-1],))
    F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and state[name].grad is not None
        assert state[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_of_several_batches_add_up_and_none_stays_on_the_model() -> None:
    model, lora = adapted(MOE)
    loss_of(model).backward()
    once = {name: p.grad.clone() for name, p in lora.named_parameters() if p.grad is not None}
    loss_of(model).backward()
    for name, p in lora.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 2 * once[name])
    assert all(p.grad is None for p in model.parameters())


def test_training_moves_the_adapted_matrices_and_nothing_else() -> None:
    """Router, experts, norms, embedding, head and prediction module stay bit for bit, and so does every W_0."""
    start = model_of(MOE)
    model = copy.deepcopy(start)
    lora = Lora(model, LoraSection(rank=2), 0, "base")
    optimizer = Optimizer(model, OptimSection(lr=1e-2), lora)
    losses = []
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        optimizer.accumulate()
        optimizer.step(1e-2)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    before = dict(start.named_parameters())
    for name, after in model.named_parameters():
        module = name.removesuffix(".weight")
        assert torch.equal(before[name], after) == (module not in lora.matrices), name
        if module in lora.matrices:
            assert torch.equal(before[name], lora.matrices[module].W0_OI)
    assert {name.rpartition(".")[2] for name in lora.matrices} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert "layers.1.mlp.shared_experts.up_proj" in lora.matrices


def test_in_bfloat16_the_adapters_stay_float32() -> None:
    model = model_of(DENSE).to(torch.bfloat16)
    lora = Lora(model, LoraSection(rank=2), 0, "base")
    optimizer = Optimizer(model, OptimSection(lr=1e-2), lora)
    loss_of(model).backward()
    optimizer.accumulate()
    assert optimizer.step(1e-2) > 0
    for name, (module, W0, A, B) in lora.matrices.items():
        assert (module.weight.dtype, W0.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (A.dtype, B.dtype) == (torch.float32, torch.float32)
        assert torch.equal(module.weight, (W0.float() + lora.scale * B @ A).to(torch.bfloat16)), name


def test_dropout_is_of_the_adapters_input_alone() -> None:
    """As the papers' y = W_0 x + s B A dropout(x): the same draws give the same output, and the same gradients."""
    _, lora = adapted(DENSE, dropout=0.5, target_modules=["down_proj"])
    name, (module, W0, A, B) = next(iter(lora.matrices.items()))
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    y = module(x)
    y.square().sum().backward()
    A2, B2 = (p.detach().clone().requires_grad_() for p in (A, B))
    torch.manual_seed(7)
    expected = F.linear(x, W0) + lora.scale * F.linear(F.linear(F.dropout(x, 0.5), A2), B2)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, F.linear(x, module.weight))
    torch.testing.assert_close(A.grad, A2.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(B.grad, B2.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        assert torch.equal(module(x), F.linear(x, module.weight)), "sampling is without dropout"


def test_scaling_and_merging() -> None:
    assert scaling(16, 32.0, False) == 2.0
    assert scaling(16, 32.0, True) == 8.0
    W0, A, B = torch.ones(3, 4), torch.arange(4.0)[None], torch.tensor([[1.0], [0.0], [2.0]])
    assert torch.equal(merged(W0, A, B, 0.5), torch.ones(3, 4) + 0.5 * torch.outer(B[:, 0], A[0]))


def test_target_modules_choose_and_are_counted() -> None:
    model = model_of(DENSE)
    section = LoraSection(rank=2, target_modules=["q_proj", "v_proj"])
    assert list(targets(model, section)) == [f"layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
    assert trained_parameters(model, section) == 4 * 2 * (16 + 16)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["q_porj"], "'q_porj', which gets no adapter here; this model has down_proj, gate_proj"),
        (["gate"], "'gate', which gets no adapter here: a router"),
        (["experts"], "'experts', which gets no adapter here: routed experts are one stacked weight"),
        (["lm_head"], "'lm_head', which gets no adapter here; this model has"),
    ],
)
def test_what_cannot_be_adapted_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        targets(model_of(MOE), LoraSection(rank=2, target_modules=names))


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.rank = 8 is no less than the rank of layers.0.self_attn.q_a_proj"):
        targets(model_of(MOE), LoraSection(rank=8))
