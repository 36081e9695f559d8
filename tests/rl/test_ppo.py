"""PPO's critic: its estimates and its loss by their definitions, runs with it, and the settings it does not go with."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.recipe import CriticSection, GrpoRecipe, RecipeError, check
from luciola.rl import grpo as module
from luciola.rl.advantage import EPS
from luciola.rl.credit import sequences
from luciola.rl.grpo import describe, grpo
from luciola.rl.ppo import Critic, explained_variance, gae, value_loss
from luciola.rl.rollout import Rollout
from luciola.rl.update import update, weigh
from luciola.train.optim import Optimizer
from luciola.train.stopping import Diverged

Make = Callable[..., GrpoRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]
P, G = 3, 4

PPO: dict[str, dict[str, Any]] = {"objective": {"name": "ppo"}, "critic": {"optim": {"lr": 3e-3}}}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(lm: LanguageModel) -> Rollout:
    """Completions of different lengths, rewards drawn at random, one of them unknown."""
    prompts = [torch.randint(7, 20, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (2, 7, 4)]
    params = SamplingParams(max_tokens=9, n=G, seed=1, logprobs=True, routes=True)
    completions = Engine(lm, dtype="model").generate(prompts, params)
    known = torch.ones(P, G, dtype=torch.bool)
    known[1, 2] = False
    return Rollout([], prompts, completions, [], {}, normal(P, G), known, 0.0, 0.0)


def settings(recipe: Make, objective: dict[str, Any] | None = None, **critic: Any) -> GrpoRecipe:
    """No clipping of gradients and no weight decay, so that the first moment shows the gradient."""
    plain = {"lr": 1e-3, "clip_grad_norm": 0, "weight_decay": 0}
    return recipe(
        rollout={"prompts": P, "group_size": G},
        objective={"name": "ppo", **(objective or {})},
        critic={"optim": plain, **critic},
        optim=plain,
    )


def learnt(critic: Critic, seed: int = 3) -> Critic:
    """With a head that says something."""
    with torch.no_grad():
        critic.model.head.weight.copy_(normal(*critic.model.head.weight.shape, seed=seed))
        critic.model.head.bias.fill_(0.3)
    return critic


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 1.0), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_gae_is_the_sum_of_its_definition(gamma: float, lam: float, length: int) -> None:
    r, V = normal(length, seed=1).double(), normal(length, seed=2).double()
    after = torch.cat((V[1:], torch.zeros(1).double())) if length else V
    delta = r + gamma * after - V
    A = [sum((gamma * lam) ** n * float(delta[t + n]) for n in range(length - t)) for t in range(length)]
    advantages, returns = gae(r.float(), V.float(), gamma, lam)
    torch.testing.assert_close(advantages.double(), torch.tensor(A).double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(returns, advantages + V.float())


def test_the_ends_of_lambda() -> None:
    """1 compares what was earned with the value, 0 looks one token ahead; both by hand."""
    r, V = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.25, 0.5, 0.75])
    assert gae(r, V, 1.0, 1.0)[0].tolist() == [0.75, 0.5, 0.25]
    assert gae(r, V, 1.0, 1.0)[1].tolist() == [1.0, 1.0, 1.0]
    assert gae(r, V, 1.0, 0.0)[0].tolist() == [0.25, 0.25, 0.25]
    assert gae(r, V, 0.5, 1.0)[1].tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_gradient_of_the_value_loss(clip: float) -> None:
    """w (V - G), and none where a value has come nearer to its return by more than the clip."""
    N = 200
    old, returns, w = normal(N).double(), normal(N, seed=1).double(), normal(N, seed=2).abs().double()
    values = (old + 0.3 * normal(N, seed=3)).double().requires_grad_()
    loss = value_loss(values, old, returns, w, clip)
    (found,) = torch.autograd.grad(loss, values)
    V = values.detach()
    far = (V - old).abs() > clip
    held = old + (V - old).clamp(-clip, clip)
    done = far & ((held - returns).abs() > (V - returns).abs()) if clip else torch.zeros(N, dtype=torch.bool)
    torch.testing.assert_close(found, torch.where(done, 0.0, w * (V - returns)))
    expected = sum(
        float(w[n]) / 2 * max(float(V[n] - returns[n]) ** 2, float(held[n] - returns[n]) ** 2 if clip else 0.0)
        for n in range(N)
    )
    assert float(loss.detach()) == pytest.approx(expected)
    assert not clip or N / 10 < int(done.sum()) < N / 2


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 0.7), returns) == pytest.approx(0.0)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) == explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0


def by_hand(critic: Critic, prompt: list[int], completion: list[int]) -> Tensor:
    """V of each token of one completion, the whole row read by itself."""
    states = critic.model.trunk.hidden(torch.tensor([prompt + completion])).states[0]
    return critic.model.head(states[len(prompt) - 1 : -1]).squeeze(1)


def test_the_critic_starts_as_the_policy_with_a_head_of_its_own(lm: LanguageModel, recipe: Make) -> None:
    critic = Critic(lm.model, settings(recipe))
    tokens = torch.tensor([[7, 9, 8]])
    torch.testing.assert_close(critic.model.trunk.hidden(tokens).states, lm.model.hidden(tokens).states)
    policy = {n: p for n, p in lm.model.named_parameters() if not n.startswith(("mtp.", "lm_head."))}
    own = {n.removeprefix("trunk."): p for n, p in critic.model.named_parameters() if n.startswith("trunk.")}
    assert own.keys() == policy.keys()
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in policy.values()}
    assert by_hand(critic, [7, 9], [8, 10]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_advantages_and_the_critics_step_follow_the_formula(lm: LanguageModel, recipe: Make, beta: float) -> None:
    """Values, rewards with their KL penalty, GAE, normalisation and the gradient of L_V, one completion at a time."""
    rollout, gamma, lam = sampled(lm), 0.9, 0.8
    chosen = settings(recipe, {"beta": beta}, gamma=gamma, lam=lam)
    reference = LanguageModel.create(lm.config, lm.tokenizer, seed=5).model if beta else None
    critic = learnt(Critic(lm.model, chosen))
    slow = copy.deepcopy(critic)
    samples = sequences(rollout, chosen, reference, critic)
    weigh(samples, chosen)
    critic.learn(samples, 0)

    advantages, total, known = [], torch.zeros(()), rollout.known_PG.flatten().tolist()
    for i, (sample, R) in enumerate(zip(samples, rollout.rewards_PG.flatten().tolist(), strict=True)):
        V = by_hand(slow, sample.prompt, sample.completion)
        r = torch.zeros(len(V))
        if reference is not None:
            row = torch.tensor([sample.prompt + sample.completion])
            logp = reference(row[:, :-1]).log_softmax(-1).gather(-1, row[:, 1:, None])[0, len(sample.prompt) - 1 :, 0]
            r = -beta * (torch.tensor(sample.old_logp) - logp.detach())
        r[-1] += R
        A, returns = gae(r, V.detach(), gamma, lam)
        torch.testing.assert_close(sample.returns_T, returns, atol=1e-5, rtol=1e-4)
        advantages.append(A if known[i] else A[:0])
        if known[i]:
            total = total + (V - returns).square().mean() / 2 / sum(known)
    every = torch.cat(advantages)
    for sample, A, k in zip(samples, advantages, known, strict=True):
        normalised = (A - every.mean()) / (every.std() + EPS) if k else torch.zeros(len(sample.completion))
        torch.testing.assert_close(sample.advantages_T, normalised, atol=1e-4, rtol=1e-4)

    total.backward()
    found = critic.optimizer.state()
    metrics = critic.metrics(samples, 0)
    assert metrics["critic/loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    grads = {n: p.grad for n, p in slow.model.named_parameters() if p.grad is not None}
    assert metrics["critic/grad_norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(grads.values())), rel=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(found[f"exp_avg.{name}"] * 10, grad, atol=1e-5, rtol=1e-3, msg=name)


def test_micro_batches_change_nothing(lm: LanguageModel, recipe: Make) -> None:
    rollout, found = sampled(lm), []
    for tokens in (8192, 1, 25):
        chosen = settings(recipe)
        chosen = chosen.model_copy(update={"grpo": chosen.grpo.model_copy(update={"micro_batch_tokens": tokens})})
        model, critic = copy.deepcopy(lm.model), learnt(Critic(lm.model, chosen))
        found.append(update(model, Optimizer(model, chosen.optim), None, rollout, chosen, 0, 1e-3, critic=critic))
    for other in found[1:]:
        assert other == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in found[0].items()}


def test_empty_completions_and_a_rollout_of_which_nothing_is_known(lm: LanguageModel, recipe: Make) -> None:
    chosen, rollout = settings(recipe), sampled(lm)
    for completion in rollout.completions[0]:
        completion.token_ids.clear()
        completion.tempered_logprobs.clear()  # type: ignore[union-attr]
        completion.routes = completion.routes[:0] if completion.routes is not None else None
    for known in (rollout.known_PG, torch.zeros(P, G, dtype=torch.bool)):
        rollout.known_PG = known
        model, critic = copy.deepcopy(lm.model), learnt(Critic(lm.model, chosen))
        before = copy.deepcopy(critic.model)
        metrics = update(model, Optimizer(model, chosen.optim), None, rollout, chosen, 0, 1e-3, critic=critic)
        assert all(torch.tensor(float(value)).isfinite() for value in metrics.values())
        moved = any(not torch.equal(a, b) for a, b in zip(critic.model.parameters(), before.parameters(), strict=True))
        assert moved == bool(known.any())


# Everything a checkpoint has to remember: two models, two optimisers on schedules of their own, a reference.
FULL: dict[str, dict[str, Any]] = {
    "grpo": {"steps": 8, "updates_per_rollout": 2, "epochs": 2},
    "objective": {"name": "ppo", "beta": 0.1},
    "critic": {"warmup_steps": 2, "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 3}},
    "evaluate": {"every": 3, "problems": 4, "samples": 2},
}


def test_a_killed_run_ends_as_if_it_had_never_stopped(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps
) -> None:
    rng = random.Random(0)
    killed = recipe("killed", **FULL)
    for lines in (3, 6):
        kill_at(grpo, killed, lines, rng)
    runs = [grpo(recipe("whole", **FULL)), grpo(killed, resume=True)]
    whole, resumed = map(steps_of, runs)
    assert whole == resumed and len(whole) == 8
    assert any(step["critic/explained_variance"] != 0 for step in whole)
    for name in ("samples.jsonl", "model/model.safetensors", "checkpoints/step-000008/critic.safetensors"):
        assert runs[0].joinpath(name).read_bytes() == runs[1].joinpath(name).read_bytes(), name
    kept = load_file(runs[0] / "checkpoints/step-000008/critic.safetensors")
    assert {"master.head.weight", "exp_avg.head.weight", "exp_avg_sq.trunk.norm.weight"} <= kept.keys()


def test_while_the_critic_warms_up_the_policy_stays(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = module.update

    def watched(model: Any, *more: Any) -> dict[str, Any]:
        metrics = real(model, *more)
        seen.append((model.lm_head.weight.detach().clone(), more[-1].model.head.weight.detach().clone()))
        return metrics

    monkeypatch.setattr(module, "update", watched)
    rollout = {"prompts": 16, "group_size": 8}  # enough for something to be right
    tiny = recipe(
        **PPO | {"rollout": rollout, "grpo": {"steps": 4}, "critic": {"warmup_steps": 2, "optim": {"lr": 1e-2}}}
    )
    grpo(tiny)
    (policy0, critic0), (policy1, critic1), (policy2, _), _ = seen
    original = load_file(Path(tiny.run.folder) / "start" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(policy0, original) and torch.equal(policy1, original)
    assert not torch.equal(policy2, original)
    assert critic0.any() and not torch.equal(critic0, critic1)


def test_a_critic_that_diverges_stops_the_run(recipe: Make) -> None:
    wild = PPO | {"critic": {"value_clip": 0, "warmup_steps": 7, "optim": {"lr": 1e30, "clip_grad_norm": 0}}}
    with pytest.raises(Diverged, match=r"critic/(loss|grad_norm) is (nan|inf) at step \d; the run has stopped"):
        grpo(recipe("wild", **wild))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"critic": {"lam": 0.9}}, "to objective.advantage = 'critic', not 'group': set objective.name = 'ppo', or"),
        (PPO | {"objective": {"name": "ppo", "advantage": "centred"}}, "belongs to objective.advantage = 'critic'"),
        (PPO | {"objective": {"name": "ppo", "ratio": "sequence"}}, "set ratio = 'token' instead of 'sequence'"),
        (PPO | {"grpo": {"replay": 0.5}}, "grpo.replay = 0.5 brings back advantages of a critic that has learnt since"),
        (PPO | {"critic": {"warmup_steps": 8}}, "critic.warmup_steps = 8 must be less than grpo.steps = 8"),
        (PPO | {"critic": {"lam": 1.5}}, "critic.lam = 1.5 must be at most 1"),
        (PPO | {"critic": {"lambda": 1}}, "unknown key critic.lambda"),
        (PPO | {"objective": {"name": "ppo", "supervision": "process"}}, "set advantage = 'group' instead of 'critic'"),
        (PPO | {"objective": {"name": "ppo", "kl": "k3"}}, "set kl = 'k1'"),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(recipe: Make, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        recipe(**changes)


def test_ppo_brings_a_critic_whose_settings_the_run_writes_down(recipe: Make) -> None:
    chosen = recipe(objective={"name": "ppo"}, rollout={"group_size": 1})
    assert chosen.critic == CriticSection()
    assert check(GrpoRecipe, json.loads(chosen.model_dump_json(exclude_none=True)), "resolved") == chosen
    assert recipe().critic is None
    in_loss = recipe(objective={"name": "ppo", "beta": 0.1, "kl": "k3", "kl_in": "loss"}).objective
    assert (in_loss.kl_in, in_loss.advantage) == ("loss", "critic")


def test_an_estimate_counts_the_second_model(recipe: Make) -> None:
    without, with_critic = describe(recipe()), describe(recipe(objective={"name": "ppo"}))
    assert with_critic["memory_bytes"] - without["memory_bytes"] == 16 * without["parameters"]
    assert with_critic["seconds"] == pytest.approx(2 * without["seconds"])


def test_the_reward_rises_and_the_critic_sees_it_coming(recipe: Make, steps_of: Steps) -> None:
    """The same task and steps as GRPO's own test, with the same demand."""
    learning = recipe(
        "learning",
        checkpoint_every=0,
        rollout={"prompts": 8, "group_size": 16, "max_tokens": 1},
        grpo={"steps": 100},
        objective={"name": "ppo", "aggregation": "token"},
        critic={"optim": {"lr": 1e-2}},
        optim={"lr": 1e-2, "schedule": "linear", "final_lr_ratio": 0.0},
    )
    steps = steps_of(grpo(learning))
    rewards = [step["reward/mean"] for step in steps]
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-10:]) / 10 > 0.4
    assert max(step["critic/explained_variance"] for step in steps[-30:]) > 0.2
