"""A training step: its loss by hand, what accumulation and precision must not change, and the balancing of experts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.data.packing import Batch
from luciola.model.transformer import Transformer
from luciola.recipe import PretrainRecipe
from luciola.train.loop import train_step
from luciola.train.optim import Optimizer
from luciola.train.pretrain import build

Make = Callable[..., PretrainRecipe]


def model_of(recipe: PretrainRecipe) -> Transformer:
    return build(recipe).model


def batch(rows: int, seed: int, width: int = 14) -> Batch:
    """Random tokens; rows end at random places and begin with a prompt that carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 20, (rows, width), generator=generator)
    place = torch.arange(width)
    start = torch.randint(1, 5, (rows, 1), generator=generator)
    end = torch.randint(6, width + 1, (rows, 1), generator=generator)
    return Batch(tokens.where(place < end, 0), (place >= start) & (place < end), None)


def join(batches: list[Batch]) -> Batch:
    tokens, trained = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    return Batch(tokens, trained, None)


def cross_entropy(model: Transformer, batch: Batch) -> Tensor:
    """The mean of -log p over all trained tokens."""
    logp = model(batch.tokens_BT[:, :-1]).log_softmax(-1).gather(-1, batch.tokens_BT[:, 1:, None]).squeeze(-1)
    return -logp[batch.trained_BT[:, 1:]].mean()


def gradients_of_a_step(recipe: PretrainRecipe, batches: list[Batch]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metrics, and the gradients of the step: 10 times the first moment."""
    model = model_of(recipe)
    optimizer = Optimizer(model, recipe.optim)
    metrics = train_step(model, optimizer, batches, recipe, 0)
    moments = {name: t * 10 for name, t in optimizer.state().items() if name.startswith("exp_avg.")}
    return metrics, moments


def test_the_loss_is_the_mean_over_all_trained_tokens_of_the_step(recipe: Make) -> None:
    batches = [batch(2, seed=0), batch(5, seed=1)]
    model = model_of(recipe())
    assert batches[0].targets != batches[1].targets
    metrics, _ = gradients_of_a_step(recipe(), batches)
    with torch.no_grad():
        assert metrics["loss"] == pytest.approx(float(cross_entropy(model, join(batches))), rel=1e-5)


@pytest.mark.parametrize("packing", ["rows", "segments"])
def test_accumulated_batches_equal_one_big_batch(recipe: Make, packing: str) -> None:
    """Main, MTP and balance loss alike, however the trained tokens are spread over the batches."""
    plain = recipe(optim={"clip_grad_norm": 0, "betas": (0.9, 0.95)}, balance_loss=0.1)
    batches = [batch(3, seed=i) for i in range(4)]
    if packing == "segments":
        segments = torch.tensor([[0] * 5 + [1] * 9]).expand(3, -1)
        batches = [b._replace(segments_BT=segments) for b in batches]
    big = join(batches)
    if packing == "segments":
        big = big._replace(segments_BT=segments.repeat(4, 1))
    one, gradients = gradients_of_a_step(plain, [big])
    many, accumulated = gradients_of_a_step(plain, batches)
    for name in ("loss", "loss/mtp", "grad_norm", "expert_load/max_violation"):
        assert many[name] == pytest.approx(one[name], rel=1e-5), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["balance_loss", "device_balance_loss", "communication_balance_loss"])
def test_balance_losses_are_weighed_and_averaged_over_batches(recipe: Make, name: str) -> None:
    """Linear in their weight, felt by the gates of main layers and modules, and accumulated like one big batch."""
    shape: dict[str, Any] = recipe().model.config or {}
    groups = {"config": shape | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}}

    def step(weight: float, batches: list[Batch]) -> dict[str, Tensor]:
        off = {"balance_loss": 0.0, "device_balance_loss": 0.0, "communication_balance_loss": 0.0}
        weighed = recipe(model=groups, optim={"clip_grad_norm": 0}, **(off | {name: weight}))
        return gradients_of_a_step(weighed, batches)[1]

    batches = [batch(3, seed=i) for i in range(2)]
    without, once, twice = (step(weight, batches) for weight in (0.0, 1.0, 2.0))
    together = step(1.0, [join(batches)])
    gates = [gate for gate in once if gate.endswith("mlp.gate.weight")]
    assert len(gates) == 2  # a main layer and a module
    for gate in gates:
        assert float((once[gate] - without[gate]).abs().max()) > 1e-4
        torch.testing.assert_close(twice[gate] - once[gate], once[gate] - without[gate], atol=1e-5, rtol=1e-3)
    for key, gradient in once.items():
        torch.testing.assert_close(together[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


def test_padding_changes_nothing(recipe: Make) -> None:
    """Neither loss and gradients nor the count of tokens an expert got."""
    plain = recipe(optim={"clip_grad_norm": 0}, balance_loss=0.1)
    narrow = batch(4, seed=0)
    wide = Batch(*(torch.nn.functional.pad(t, (0, 6)) for t in narrow[:2]), None)
    one, gradients = gradients_of_a_step(plain, [narrow])
    two, padded = gradients_of_a_step(plain, [wide])
    assert {k: pytest.approx(v, rel=1e-5) for k, v in one.items()} == two
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_activation_checkpointing_gives_the_same_step(recipe: Make) -> None:
    found = []
    for checkpointing in (False, True):
        model = model_of(recipe())
        model.activation_checkpointing = checkpointing
        optimizer = Optimizer(model, recipe().optim)
        metrics = train_step(model, optimizer, [batch(4, seed=0)], recipe(), 0)
        found.append((metrics, list(model.parameters())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_weight_of_the_prediction_modules(recipe: Make) -> None:
    """Gradients are linear in mtp_weight; with 0 the modules are not run at all."""

    def step(weight: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        r = recipe(mtp_weight=weight, balance_loss=0, optim={"clip_grad_norm": 0})
        return gradients_of_a_step(r, [batch(3, seed=0)])

    (off, none), (_, half), (on, full) = step(0.0), step(0.5), step(1.0)
    assert "loss/mtp" not in off
    assert on["loss"] == off["loss"]
    assert not any(".mtp." in name for name in none)
    assert any(".mtp." in name for name in full)
    for name, gradient in full.items():
        middle = (none.get(name, torch.zeros_like(gradient)) + gradient) / 2
        torch.testing.assert_close(half[name], middle, atol=1e-6, rtol=1e-4, msg=name)


def test_biases_move_by_the_load_of_the_whole_step(recipe: Make) -> None:
    """Once a step, by the speed, against the tokens counted over all batches and in the modules as well."""
    model = model_of(recipe())
    with torch.no_grad():
        for layer in (*model.moe_layers, *model.mtp_moe_layers):
            layer.gate.weight[1] += 1.0  # lopsided
    before = {id(m): m.gate.e_score_correction_bias.clone() for m in (*model.moe_layers, *model.mtp_moe_layers)}
    optimizer = Optimizer(model, recipe().optim)
    metrics = train_step(model, optimizer, [batch(3, seed=i) for i in range(3)], recipe(bias_update_speed=0.01), 0)
    assert metrics["expert_load/max_violation"] > 0
    for layer in (*model.moe_layers, *model.mtp_moe_layers):
        moved = layer.gate.e_score_correction_bias - before[id(layer)]
        assert bool(((moved.abs() - 0.01).abs() < 1e-8)[moved != 0].all())
        assert moved.min() < 0 < moved.max()


def test_a_speed_of_0_keeps_the_biases(recipe: Make) -> None:
    model = model_of(recipe())
    optimizer = Optimizer(model, recipe().optim)
    train_step(model, optimizer, [batch(3, seed=0)], recipe(bias_update_speed=0.0), 0)
    assert all(bool((m.gate.e_score_correction_bias == 0).all()) for m in model.moe_layers)


def test_a_step_without_a_token_to_train_on_says_so(recipe: Make) -> None:
    model = model_of(recipe())
    empty = Batch(torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.bool), None)
    with pytest.raises(ValueError, match="step 8 has no token to train on"):
        train_step(model, Optimizer(model, recipe().optim), [empty], recipe(), 7)


def test_one_batch_of_several_may_be_empty(recipe: Make) -> None:
    empty = Batch(torch.zeros(3, 14, dtype=torch.long), torch.zeros(3, 14, dtype=torch.bool), None)
    full = batch(3, seed=0)
    plain = recipe(balance_loss=0, optim={"clip_grad_norm": 0})
    one, gradients = gradients_of_a_step(plain, [full])
    two, with_empty = gradients_of_a_step(plain, [full, empty])
    assert two["loss"] == pytest.approx(one["loss"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(with_empty[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_bfloat16_learns_as_float32_does(recipe: Make) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(recipe()).to(dtype)
        optimizer = Optimizer(model, recipe().optim)
        losses.append([train_step(model, optimizer, [batch(4, 0)], recipe(), s)["loss"] for s in range(12)])
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
