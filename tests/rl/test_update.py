"""An update against a plain loop over sequences, and what the way of cutting and ordering it must not change."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.engine.engine import Completion, Engine
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.advantage import group_advantages
from luciola.rl.batch import micro_batches
from luciola.rl.credit import sequences
from luciola.rl.rollout import Rollout
from luciola.rl.update import update
from luciola.train.optim import Optimizer

Make = Callable[..., GrpoRecipe]
P, G = 4, 3


def sampled(lm: LanguageModel, *, temperature: float = 1.0, unknown: bool = True, flat: bool = True) -> Rollout:
    """Completions of different lengths from the model itself, with rewards drawn at random.

    One reward is unknown, and the last group's are all equal.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(7, 20, (n,), generator=generator).tolist() for n in (2, 7, 4, 3)]
    params = SamplingParams(max_tokens=9, n=G, seed=1, temperature=temperature, logprobs=True, routes=True)
    completions = Engine(lm, dtype="model").generate(prompts, params)
    rewards = torch.rand(P, G, generator=generator)
    known = torch.ones(P, G, dtype=torch.bool)
    if unknown:
        known[1, 2] = False
    if flat:
        rewards[3] = 0.1
    return Rollout([], prompts, completions, [], {}, rewards, known, 0.0, 0.0)


LOOP = ("updates_per_rollout", "epochs", "replay_routes", "micro_batch_tokens")  # the others are the objective's


def settings(recipe: Make, *, group_size: int = G, **changes: Any) -> GrpoRecipe:
    """Without clipping of gradients and weight decay, so that the first moment shows the gradient."""
    return recipe(
        rollout={"prompts": P, "group_size": group_size},
        grpo={k: v for k, v in changes.items() if k in LOOP},
        objective={k: v for k, v in changes.items() if k not in LOOP},
        optim={"lr": 1e-3, "clip_grad_norm": 0, "weight_decay": 0},
    )


def gradients(optimizer: Optimizer) -> dict[str, Tensor]:
    """Of the only step so far: ten times the first moment."""
    return {n.removeprefix("exp_avg."): t * 10 for n, t in optimizer.state().items() if n.startswith("exp_avg.")}


def run(lm: LanguageModel, rollout: Rollout, recipe: GrpoRecipe, reference: Transformer | None = None) -> Any:
    """Metrics, gradients of a single step, and the model after it."""
    model = copy.deepcopy(lm.model)
    optimizer = Optimizer(model, recipe.optim)
    metrics = update(model, optimizer, reference, rollout, recipe, 0, 1e-3)
    return metrics, gradients(optimizer), model


def by_hand(model: Transformer, rollout: Rollout, recipe: GrpoRecipe, reference: Transformer | None) -> float:
    """The loss, one sequence after the other, all logits, written as in the papers; leaves gradients behind."""
    grpo, total = recipe.objective, torch.zeros(())
    scale = grpo.advantage == "group"
    advantages = group_advantages(rollout.rewards_PG, rollout.known_PG, scale=scale)
    known = rollout.known_PG
    tokens = sum(len(c.token_ids) for p in range(P) for g, c in enumerate(rollout.completions[p]) if known[p, g])
    for p, (prompt, group) in enumerate(zip(rollout.prompts, rollout.completions, strict=True)):
        for g, c in enumerate(group):
            if not known[p, g]:
                continue
            row = torch.tensor([prompt + c.token_ids])
            routes = c.routes[None] if c.routes is not None and recipe.grpo.replay_routes else None

            def logp(m: Transformer, routes: Tensor | None, row: Tensor = row, start: int = len(prompt) - 1) -> Tensor:
                logits = m.lm_head(m.hidden(row[:, :-1], routes_BTLK=routes).states) / recipe.rollout.temperature
                return logits.log_softmax(-1).gather(-1, row[:, 1:, None])[0, start:, 0]

            new, old = logp(model, routes), torch.tensor(c.tempered_logprobs)
            ratio, A = (new - old).exp(), advantages[p, g]
            objective = torch.minimum(ratio * A, ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high) * A)
            if grpo.beta and reference is not None:
                with torch.no_grad():
                    r = logp(reference, None)
                objective = objective - grpo.beta * ((r - new).exp() - (r - new) - 1)
            if grpo.aggregation == "sequence":
                total = total - objective.mean() / known.sum()
            else:
                total = total - objective.sum() / tokens
    total.backward()
    return float(total.detach())


@pytest.mark.parametrize(
    "grpo",
    [
        {},
        {"aggregation": "token"},
        {"advantage": "centred"},
        {"beta": 0.3},
        {"beta": 0.3, "aggregation": "token", "replay_routes": False},
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_update_follows_the_gradient_of_the_formula(
    lm: LanguageModel, recipe: Make, grpo: dict[str, Any], temperature: float
) -> None:
    rollout = sampled(lm, temperature=temperature)
    chosen = settings(recipe, **grpo)
    chosen = chosen.model_copy(update={"rollout": chosen.rollout.model_copy(update={"temperature": temperature})})
    reference = LanguageModel.create(lm.config, lm.tokenizer, seed=5).model if chosen.objective.beta else None
    metrics, found, _ = run(lm, rollout, chosen, reference)
    slow = copy.deepcopy(lm.model)
    loss = by_hand(slow, rollout, chosen, reference)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
    for name, p in slow.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)
    norm = torch.nn.utils.get_total_norm([p.grad for p in slow.parameters() if p.grad is not None])
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_micro_batches_and_order_change_nothing(lm: LanguageModel, recipe: Make, beta: float) -> None:
    rollout, reference = sampled(lm), LanguageModel.create(lm.config, seed=5).model if beta else None
    whole, expected, _ = run(lm, rollout, settings(recipe, beta=beta), reference)
    order = [2, 0, 3, 1]
    shuffled = Rollout(
        [], [rollout.prompts[p] for p in order], [rollout.completions[p][::-1] for p in order], [],
        rollout.parts, rollout.rewards_PG[order].flip(1), rollout.known_PG[order].flip(1), 0.0, 0.0,
    )  # fmt: skip
    for other, tokens in ((rollout, 1), (rollout, 30), (shuffled, 8192), (shuffled, 17)):
        metrics, found, _ = run(lm, other, settings(recipe, beta=beta, micro_batch_tokens=tokens), reference)
        assert metrics == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in whole.items()}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_micro_batches_keep_within_their_tokens(lm: LanguageModel, recipe: Make) -> None:
    everything = sequences(sampled(lm), settings(recipe))
    random.Random(0).shuffle(everything)
    for most in (1, 20, 40, 10_000):
        batches = list(micro_batches(everything, most))
        shapes = [batch.layout.shape for batch in batches]
        assert sum(rows for rows, _ in shapes) == P * G
        assert all(rows * width <= most or rows == 1 for rows, width in shapes)
        assert sum(len(b.targets_N) for b in batches) == sum(len(s.completion) for s in everything)


@pytest.mark.parametrize("replay", [True, False])
def test_engine_and_trainer_agree(lm: LanguageModel, recipe: Make, replay: bool) -> None:
    """The KL between rollout and trainer, measured on fresh weights, is rounding."""
    metrics, _, _ = run(lm, sampled(lm), settings(recipe, replay_routes=replay))
    assert 0.0 <= metrics["kl/engine"] < 1e-10
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["loss"]) < 0.2  # on policy the loss is the weighted mean of advantages: about nothing


def test_replayed_routes_keep_ratios_at_one_when_the_gate_has_moved(lm: LanguageModel, recipe: Make) -> None:
    """Rollout and update by different experts is a mismatch; the replay takes the rollout's."""
    rollout = sampled(lm)
    moved = copy.deepcopy(lm)
    with torch.no_grad():
        for layer in moved.model.moe_layers:
            layer.gate.e_score_correction_bias += torch.tensor([1.0, -1.0, 1.0, -1.0])
    with_replay, _, _ = run(moved, rollout, settings(recipe))
    without, _, _ = run(moved, rollout, settings(recipe, replay_routes=False))
    assert with_replay["kl/engine"] < 1e-10
    assert without["kl/engine"] > 1e-6


def test_a_rollout_without_any_spread_moves_nothing(lm: LanguageModel, recipe: Make) -> None:
    rollout = sampled(lm)
    rollout.rewards_PG.fill_(0.1)
    metrics, found, model = run(lm, rollout, settings(recipe))
    assert metrics["groups/without_spread"] == 1.0
    assert metrics["grad_norm"] == 0.0
    assert all(not bool(g.any()) for g in found.values())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), lm.model.parameters(), strict=True))


def test_unknown_rewards_change_nothing_whatever_they_say(lm: LanguageModel, recipe: Make) -> None:
    rollout = sampled(lm)
    _, expected, _ = run(lm, rollout, settings(recipe))
    rollout.rewards_PG[1, 2] = 100.0
    rollout.completions[1][2] = Completion("", [9] * 40, "length", [-9.0] * 40, [-9.0] * 40, None)
    chosen = settings(recipe, replay_routes=False)
    _, without, _ = run(lm, sampled(lm), chosen)
    _, found, _ = run(lm, rollout, chosen)
    for name, gradient in without.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4, msg=name)
    assert expected.keys() == found.keys()


def test_several_updates_of_a_rollout_see_every_group_once_an_epoch(
    lm: LanguageModel, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of two groups each, twice: later ones are off policy, and their ratios leave 1."""
    import luciola.rl.update as module

    seen: list[list[int]] = []
    real = module._step

    def step(model: Any, optimizer: Any, reference: Any, chosen: Any, *more: Any) -> None:
        seen.append([len(s.prompt) for s in chosen])
        real(model, optimizer, reference, chosen, *more)

    monkeypatch.setattr(module, "_step", step)
    metrics, _, model = run(lm, sampled(lm), settings(recipe, updates_per_rollout=2, epochs=2, clip_low=0.001))
    lengths = sorted([2, 7, 4, 3] * G)
    assert [len(groups) for groups in seen] == [2 * G] * 4
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == lengths
    assert metrics["clip_fraction"] > 0
    assert metrics["kl/engine"] < 1e-10  # of the first update alone
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), lm.model.parameters(), strict=True))


def test_later_updates_clip_against_the_rollout_not_against_each_other(lm: LanguageModel, recipe: Make) -> None:
    """Two epochs over a rollout equal two single updates by hand whose pi_old stays the engine's."""
    rollout, chosen = sampled(lm), settings(recipe, epochs=2)
    _, _, ours = run(lm, rollout, chosen)
    model = copy.deepcopy(lm.model)
    optimizer = Optimizer(model, chosen.optim)
    for _ in range(2):
        by_hand(model, rollout, chosen, None)
        optimizer.accumulate()
        optimizer.step(1e-3)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_bfloat16_follows_the_same_gradient(lm: LanguageModel, recipe: Make) -> None:
    rollout = sampled(lm)
    _, exact, _ = run(lm, rollout, settings(recipe))
    rounded = LanguageModel(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer)
    metrics, found, _ = run(rounded, rollout, settings(recipe))
    assert metrics["kl/engine"] > 1e-8  # the rollout was sampled in float32, and the log shows it
    flat, flat_exact = (torch.cat([g[n].float().flatten() for n in sorted(exact)]) for g in (found, exact))
    assert float(torch.nn.functional.cosine_similarity(flat, flat_exact, dim=0)) > 0.95
