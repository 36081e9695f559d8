"""Every objective by name: the gradient of its loss equals autograd of its formula, written here on padded rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.recipe.objective import NAMES, ObjectiveSection
from luciola.rl.objective import Tokens, policy_loss, token_weights

S, T, LONGEST = 4, 6, 10
LENGTHS = torch.tensor([3, 6, 1, 4])
MASK_ST = torch.arange(T) < LENGTHS[:, None]


def batch(seed: int = 0, off: float = 0.4) -> dict[str, Tensor]:
    """Padded log-probabilities of a policy that has moved by about `off` nats a token, and advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logp = -normal(S, T).abs() - 0.2
    return {
        "logp": logp,
        "old": logp - off * normal(S, T),
        "ref": logp - 0.5 * normal(S, T),
        "A": torch.tensor([1.3, -0.7, -1.1, 0.4], dtype=torch.float64),
    }


def ours(objective: ObjectiveSection, b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient in log pi, (S, T), from the flat list of tokens that the trainer uses."""
    sequence = torch.arange(S).repeat_interleave(LENGTHS)
    weights = token_weights(LENGTHS, objective.aggregation, torch.ones(S, dtype=torch.bool), LONGEST).double()
    advantages, pair = b["A"], None
    if objective.advantage == "pairs":
        advantages, weights = torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), torch.full((S,), 0.5).double()
        pair = torch.tensor([0, 0, 1, 1])[sequence]
    logp = b["logp"].clone().requires_grad_()
    old = b["old"][MASK_ST]
    each = advantages[MASK_ST] if advantages.ndim == 2 else advantages[sequence]
    tokens = Tokens(logp[MASK_ST], old, old, each, weights[sequence], sequence, b["ref"][MASK_ST], pair)
    loss = policy_loss(tokens, objective).loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def mean_of_means(x_ST: Tensor) -> Tensor:
    return ((x_ST * MASK_ST).sum(1) / LENGTHS).mean()


def over_tokens(x_ST: Tensor) -> Tensor:
    return (x_ST * MASK_ST).sum() / LENGTHS.sum()


def smaller(ratio: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def grpo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -mean_of_means(smaller((logp - b["old"]).exp(), b["A"][:, None], 0.2, 0.2))


def dr_grpo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -(smaller((logp - b["old"]).exp(), b["A"][:, None], 0.2, 0.2) * MASK_ST).sum() / (S * LONGEST)


def dapo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -over_tokens(smaller((logp - b["old"]).exp(), b["A"][:, None], 0.2, 0.28))


def gspo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    s = (((logp - b["old"]) * MASK_ST).sum(1) / LENGTHS).exp()
    return -smaller(s, b["A"], 3e-4, 4e-4).mean()


def cispo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    weight = (logp - b["old"]).exp().clamp(max=5.0).detach()
    return -over_tokens(weight * b["A"][:, None] * logp)


def rloo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -smaller(((logp - b["old"]) * MASK_ST).sum(1).exp(), b["A"], 0.2, 0.2).mean()


def reinforce(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -over_tokens(smaller((logp - b["old"]).exp(), b["A"][:, None], 0.2, 0.2))


def ppo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -mean_of_means(smaller((logp - b["old"]).exp(), b["A"], 0.2, 0.2))


def rft(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    return -mean_of_means(b["A"][:, None] * logp)


def dpo(logp: Tensor, b: dict[str, Tensor]) -> Tensor:
    h = ((logp - b["ref"]) * MASK_ST).sum(1)
    return -torch.log(1 / (1 + torch.exp(-0.1 * (h[[0, 2]] - h[[1, 3]])))).mean()


FORMULAS: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo, "rloo": rloo,
    "reinforce++": reinforce, "ppo": ppo, "rft": rft, "dpo": dpo,
}  # fmt: skip


def test_every_name_has_its_formula() -> None:
    assert FORMULAS.keys() == NAMES.keys()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("off", [1e-5, 0.4])
def test_the_gradient_is_that_of_the_formula(name: Any, off: float) -> None:
    for seed in range(5):
        b = batch(seed, off)
        if name == "ppo":  # a critic gives every token an advantage of its own
            b["A"] = torch.randn(S, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        loss, gradient = ours(ObjectiveSection(name=name), b)
        logp = b["logp"].clone().requires_grad_()
        expected = FORMULAS[name](logp, b)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logp)[0])
        assert bool((gradient != 0).any()) or name == "gspo"  # GSPO's narrow band may cut all four sequences


@pytest.mark.parametrize("kl", ["k2", "k3", "unbiased"])
def test_the_kl_terms(kl: Any) -> None:
    b = batch()
    objective = ObjectiveSection(beta=0.3, kl=kl)
    _, with_kl = ours(objective, b)
    _, without = ours(ObjectiveSection(), b)
    ratio, d = (b["logp"] - b["old"]).exp(), b["ref"] - b["logp"]
    # d D / d log pi: -d (k2), 1 - pi_ref / pi (k3), rho log(pi / pi_ref) (unbiased: pi_ref / pi cancels)
    slope = {"k2": -d, "k3": 1 - d.exp(), "unbiased": -ratio * d}[kl]
    torch.testing.assert_close(with_kl - without, 0.3 * slope * MASK_ST / (S * LENGTHS[:, None]))


@pytest.mark.parametrize(
    ("name", "c"),
    [
        ("grpo", lambda n: 1 / (S * n)), ("gspo", lambda n: 1 / (S * n)), ("rloo", lambda n: 1 / S),
        ("dapo", lambda n: 1 / 14), ("cispo", lambda n: 1 / 14), ("dr_grpo", lambda n: 1 / (S * LONGEST)),
    ],
)  # fmt: skip
def test_on_policy_all_are_policy_gradients_with_their_own_denominator(name: Any, c: Callable[[int], float]) -> None:
    b = batch(off=0.0)
    _, gradient = ours(ObjectiveSection(name=name), b)
    expected = torch.stack([-c(n) * A * row for n, A, row in zip(LENGTHS.tolist(), b["A"], MASK_ST, strict=True)])
    torch.testing.assert_close(gradient, expected)


def test_sequences_gone_off_policy_are_left_out_where_they_did_worse() -> None:
    b = batch()
    b["A"] = torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    b["old"] = b["logp"] + torch.tensor([0.9, 0.9, 0.1, 0.1]).double()[:, None]  # mean log(pi_old / pi)
    free = ObjectiveSection(clip="none", aggregation="sequence_sum")
    _, plain = ours(free, b)
    _, masked = ours(free.model_copy(update={"off_policy_delta": 0.5}), b)
    assert masked.any(1).tolist() == [True, False, True, True]
    torch.testing.assert_close(masked[[0, 2, 3]], plain[[0, 2, 3]])


def test_truncated_importance_weights_scale_each_token() -> None:
    b = batch(off=0.0)
    objective = ObjectiveSection(importance_cap=2.0)
    sequence = torch.arange(S).repeat_interleave(LENGTHS)
    drift = torch.tensor([1.5, -1.0, 0.2, 0.0]).double()[sequence]  # log(pi_old / pi_sampler)
    logp = b["logp"][MASK_ST].requires_grad_()
    old = logp.detach()
    tokens = Tokens(logp, old, old - drift, b["A"][sequence], torch.ones_like(old), sequence)
    (gradient,) = torch.autograd.grad(policy_loss(tokens, objective).loss, logp)
    torch.testing.assert_close(gradient, -drift.exp().clamp(max=2.0) * b["A"][sequence])


def test_empty_completions_neither_weigh_nor_divide_by_zero() -> None:
    lengths, known = torch.tensor([0, 2, 0]), torch.ones(3, dtype=torch.bool)
    expected = {"sequence": 0.5, "token": 0.5, "constant": 0.1, "sequence_sum": 1.0}
    for aggregation, w in expected.items():
        assert token_weights(lengths, aggregation, known, LONGEST).tolist() == pytest.approx([0, w, 0])  # type: ignore[arg-type]
        nothing = torch.zeros(3, dtype=torch.long)
        assert token_weights(nothing, aggregation, known, LONGEST).tolist() == [0, 0, 0]  # type: ignore[arg-type]
