"""PPO's critic: a value model beside the policy, which GRPO does without (DeepSeekMath, section 4.1.1 and equation 1).

    r_t     = [t = T] R - beta log(pi_old / pi_ref)                     reward of token t
    delta_t = r_t + gamma V_{t+1} - V_t,   V_{T+1} = 0
    A_t     = sum_{l >= 0} (gamma lambda)^l delta_{t+l}                 generalised advantage estimate (GAE)
    L_V     = 1/2 sum_t w_t max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2),   G_t = A_t + V_t

V_t is the value of prompt and completion before token t, read from the state that predicts t. The policy's side is
the core that all objectives share (objective.py), with A_t normalised over the rollout; w are its weights, so policy
and critic count the same tokens.

Shapes: T tokens of one completion, N of a micro-batch, one completion after the other, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from luciola.model.transformer import Transformer
from luciola.recipe import GrpoRecipe
from luciola.rl.advantage import global_advantages
from luciola.rl.batch import MicroBatch, Sample, micro_batches
from luciola.train.optim import Optimizer
from luciola.train.schedule import learning_rate


def gae(rewards_T: Tensor, values_T: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages A and returns G = A + V of one completion, (T,) both; after its last token nothing more is earned.

    Args:
        rewards_T: what each token earns.
        values_T: what the critic expected before each token, of it and all later ones.
        gamma, lam: discount, and how far the estimate looks beyond the next value.
    """
    rewards, values = rewards_T.double().tolist(), values_T.double().tolist()
    advantages = [0.0] * len(rewards)
    later, next_value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * next_value - values[t] + gamma * lam * later
        advantages[t], next_value = later, values[t]
    advantages_T = torch.tensor(advantages, dtype=torch.double)
    return advantages_T.float(), (advantages_T + values_T.double()).float()


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, weights_N: Tensor, clip: float) -> Tensor:
    """L_V of some tokens: the larger of the squared errors of V and of V held within `clip` of the rollout's value.

    A value that has come `clip` nearer to its return has no gradient any more. With `clip` 0 it is the plain error.
    """
    errors_N = (values_N - returns_N).square()
    if clip:
        held_N = torch.minimum(torch.maximum(values_N, old_values_N - clip), old_values_N + clip)
        errors_N = torch.maximum(errors_N, (held_N - returns_N).square())
    return (weights_N * errors_N).sum() / 2


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(G - V) / Var(G), with values from before the critic learnt from these returns.

    1 for a critic that foresees every return, 0 for one that says the same everywhere (or where all returns are the
    same), below 0 for one that is worse than that.
    """
    if len(returns_N) < 2 or not bool((returns_N != returns_N[0]).any()):
        return 0.0
    return 1.0 - float((returns_N - values_N).double().var() / returns_N.double().var())


class ValueModel(nn.Module):
    """V: the policy's layers, copied, under a head with a single output, which is 0 at first."""

    def __init__(self, policy: Transformer) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy).requires_grad_(True)
        del self.trunk.lm_head, self.trunk.mtp  # it predicts no tokens
        self.head = nn.Linear(policy.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: MicroBatch) -> Tensor:
        """V_t of every completion token, (N,) float32."""
        states_1TD = self.trunk.hidden(batch.tokens_1T, layout=batch.layout).states
        states_ND = states_1TD[0].index_select(0, batch.sources_N)
        values_N1: Tensor = self.head(states_ND.float())
        return values_N1.squeeze(1)


class Critic:
    """The value model in training: it assesses what a rollout's completions were worth, and learns from them."""

    def __init__(self, policy: Transformer, recipe: GrpoRecipe) -> None:
        assert recipe.critic is not None
        self.recipe, self.settings = recipe, recipe.critic
        self.model = ValueModel(policy)
        self.optimizer = Optimizer(self.model, self.settings.optim)
        self._forget_sums()

    def _forget_sums(self) -> None:
        self.loss, self.norm, self.steps = 0.0, 0.0, 0

    def warming_up(self, step: int) -> bool:
        """Whether the policy has to wait in this step."""
        return step < self.settings.warmup_steps

    def advantages(self, samples: Sequence[Sample], rewards: Sequence[Tensor]) -> list[Tensor]:
        """A of every token, (T,) each, normalised over the rollout; samples keep values and returns to learn from.

        Args:
            rewards: of each sample what each of its tokens earns, (T,).
        """
        gamma, lam = self.settings.gamma, self.settings.lam
        with torch.no_grad():
            for batch in self._batches(samples):
                values = self.model(batch).split(batch.counts_S.tolist())
                for sample, values_T in zip(batch.samples, values, strict=True):
                    sample.values_T = values_T
        advantages = []
        for sample, rewards_T in zip(samples, rewards, strict=True):
            advantages_T, sample.returns_T = gae(rewards_T, sample.values_T, gamma, lam)
            advantages.append(advantages_T)
        return global_advantages(advantages, [sample.known for sample in samples])

    def learn(self, chosen: Sequence[Sample], step: int) -> None:
        """One optimiser step on the chosen samples, whose weights are those of the policy's step."""
        for batch in self._batches(s for s in chosen if s.weight):
            old_values_N, returns_N = _foretold(batch.samples)
            weights_N = torch.tensor([s.weight for s in batch.samples]).repeat_interleave(batch.counts_S)
            loss = value_loss(self.model(batch), old_values_N, returns_N, weights_N, self.settings.value_clip)
            loss.backward()
            self.optimizer.accumulate()
            self.loss += float(loss.detach())
        self.norm += self.optimizer.step(self.learning_rate(step))
        self.steps += 1

    def metrics(self, samples: Sequence[Sample], step: int) -> dict[str, float]:
        """What this step's rollout, all its `samples`, showed of the critic; means over the step's optimiser steps."""
        values, returns = _foretold([s for s in samples if s.known])
        found = {
            "critic/loss": self.loss / self.steps,
            "critic/grad_norm": self.norm / self.steps,
            "critic/lr": self.learning_rate(step),
            "critic/value": float(values.mean()) if len(values) else 0.0,
            "critic/explained_variance": explained_variance(values, returns),
        }
        self._forget_sums()
        return found

    def learning_rate(self, step: int) -> float:
        """That of its own schedule."""
        return learning_rate(self.settings.optim, step, self.recipe.grpo.steps)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, for a checkpoint. RL leaves the experts' biases, which are no weights, as they came."""
        return self.optimizer.state()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.optimizer.restore(dict(tensors))

    def _batches(self, samples: Iterable[Sample]) -> Iterable[MicroBatch]:
        return micro_batches([s for s in samples if s.completion], self.recipe.grpo.micro_batch_tokens)


def _foretold(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """V and G of all tokens of the samples, (N,) both."""
    nothing = torch.zeros(0)
    return (
        torch.cat([nothing, *(sample.values_T for sample in samples)]),
        torch.cat([nothing, *(sample.returns_T for sample in samples)]),
    )
