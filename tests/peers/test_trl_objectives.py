"""Each objective's loss and gradient against TRL's own `_compute_loss`, on the same tensors.

TRL's trainers are called without being built: what they would ask a model for, the log-probability of every token, is
given to them. Rows are padded there and one flat list of tokens here. REINFORCE++ and rejection fine-tuning have no
counterpart in TRL; `tests/rl/test_gradients.py` has their formulas.

Where the two define something differently the test says so: the numbers of CISPO's cap, completions that are left out,
and the mean over micro-batches.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from luciola.recipe.objective import ObjectiveSection
from luciola.rl.objective import Tokens, policy_loss, token_weights

B, T, LONGEST = 6, 7, 12
LENGTHS = torch.tensor([3, 7, 1, 4, 6, 2])
MASK_BT = (torch.arange(T) < LENGTHS[:, None]).long()
ADVANTAGES = torch.tensor([1.3, -0.7, -1.1, 0.4, 0.9, -0.8], dtype=torch.float64)


def rows(seed: int, off: float = 0.4) -> dict[str, Tensor]:
    """log pi, log pi_old, log pi_sampler and log pi_ref of every token, (B, T) each."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(B, T, generator=generator, dtype=torch.float64)

    logp = -normal().abs() - 0.2
    old = logp - off * normal()
    return {"logp": logp, "old": old, "sampler": old - 0.6 * normal(), "reference": logp - 0.5 * normal()}


def ours(x: dict[str, Tensor], known: Tensor | None = None, **parts: Any) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in log pi, (B, T)."""
    objective = ObjectiveSection(**parts)
    mask, sequence = MASK_BT.bool(), torch.arange(B).repeat_interleave(LENGTHS)
    everyone = torch.ones(B, dtype=torch.bool) if known is None else known
    weights = token_weights(LENGTHS, objective.aggregation, everyone, LONGEST).double()
    logp = x["logp"].clone().requires_grad_()
    tokens = Tokens(
        logp[mask], x["old"][mask], x["sampler"][mask], ADVANTAGES[sequence], weights[sequence], sequence,
        x["reference"][mask],
    )  # fmt: skip
    loss = policy_loss(tokens, objective).loss
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def one_process() -> SimpleNamespace:
    """As much of an accelerator as the losses ask for."""
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}
    return SimpleNamespace(num_processes=1, device=torch.device("cpu"), **same)


def trainer(logp: Tensor, **settings: Any) -> SimpleNamespace:
    """A GRPO or RLOO trainer whose model gives these log-probabilities, for one micro-batch, not accumulating."""
    args = {"delta": None, "use_bias_correction_kl": settings.pop("use_bias_correction_kl", False)}
    defaults: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
        "off_policy_mask_threshold": None, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "max_completion_length": LONGEST, "top_entropy_quantile": 1.0, "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False, "model": SimpleNamespace(training=False),
    }  # fmt: skip
    given = SimpleNamespace(
        accelerator=one_process(), args=SimpleNamespace(**args),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, **(defaults | settings),
    )  # fmt: skip
    given.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
    given._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
    return given


def theirs(
    x: dict[str, Tensor], Trainer: Any = GRPOTrainer, mask_BT: Tensor = MASK_BT, items: int | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    """The same from TRL; `items` is the number of tokens in the whole step where this is a part of it."""
    logp = x["logp"].clone().requires_grad_()
    ids = torch.zeros_like(mask_BT)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask_BT,
        "advantages": x.get("advantages", ADVANTAGES), "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["reference"], "sampling_per_token_logps": x["sampler"],
        "importance_sampling_ratio": (x["old"] - x["sampler"]).exp().clamp(max=2.0),
        "old_logps": (x["old"] * mask_BT).sum(1), "num_items_in_batch": torch.tensor(items or int(mask_BT.sum())),
    }  # fmt: skip
    loss = Trainer._compute_loss(trainer(logp, **given), None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {}),
    "clip-higher": ({"clip_high": 0.28}, {"epsilon_high": 0.28}),
    "dr_grpo": ({"name": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"name": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ({"name": "dapo"}, {"loss_type": "bnpo", "epsilon_high": 0.28}),
    "gspo": (
        {"name": "gspo", "clip_low": 0.05, "clip_high": 0.08},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    ),
    # the cap is 1 + clip_high here, as of every other ratio, and epsilon_high itself in TRL
    "cispo": ({"name": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
    "kl": ({"beta": 0.3}, {"beta": 0.3}),
    "unbiased kl": ({"beta": 0.3, "kl": "unbiased"}, {"beta": 0.3, "use_bias_correction_kl": True}),
    "kl, token mean": ({"name": "dapo", "beta": 0.3}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    "truncated importance sampling": (
        {"importance_cap": 2.0, "beta": 0.1},
        {"use_vllm": True, "vllm_importance_sampling_correction": True, "beta": 0.1},
    ),
    "off-policy sequence masking": (
        {"off_policy_delta": 0.1, "beta": 0.1},
        {"off_policy_mask_threshold": 0.1, "beta": 0.1},
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("off", [0.01, 0.4])
def test_loss_and_gradient_are_trl_s(name: str, off: float) -> None:
    here, there = OBJECTIVES[name]
    for seed in range(5):
        x = rows(seed, off)
        loss, gradient = ours(x, **here)
        their_loss, their_gradient = theirs(x, **there)
        torch.testing.assert_close(loss, their_loss)
        torch.testing.assert_close(gradient, their_gradient)
        assert bool(gradient.any())


@pytest.mark.parametrize("part", ["clip-higher", "kl", "truncated importance sampling", "off-policy sequence masking"])
def test_the_rows_tell_each_part_from_its_absence(part: str) -> None:
    """So that none of the comparisons above holds because the part does nothing."""
    with_part = OBJECTIVES[part][0]
    without = {} if part == "kl" else {"beta": with_part.get("beta", 0.0)}
    found = [(ours(rows(seed), **with_part)[1], ours(rows(seed), **without)[1]) for seed in range(5)]
    assert not all(torch.allclose(a, b) for a, b in found)


def test_rloo_is_trl_s() -> None:
    for seed in range(5):
        x = rows(seed, off=0.1)
        loss, gradient = ours(x, name="rloo")
        their_loss, their_gradient = theirs(x, RLOOTrainer)
        torch.testing.assert_close(loss, their_loss)
        torch.testing.assert_close(gradient, their_gradient)
        assert bool(gradient.any())


def test_dpo_is_trl_s() -> None:
    """TRL puts the chosen completions first and the rejected ones after them."""
    x, beta = rows(3), 0.3
    half = B // 2
    logp = x["logp"].clone().requires_grad_()
    reference_B = (x["reference"] * MASK_BT).sum(1)
    model_out = SimpleNamespace(log_probs=logp * MASK_BT, entropy=logp.detach(), mean_logits=logp.detach())
    model_out.is_top1 = torch.zeros(B, T, dtype=torch.bool)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=one_process(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=beta, use_weighting=False, _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    prompt = torch.zeros(B, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long), "attention_mask": torch.cat((prompt + 1, MASK_BT), 1),
        "completion_mask": torch.cat((prompt, MASK_BT), 1), "ref_chosen_logps": reference_B[:half],
        "ref_rejected_logps": reference_B[half:],
    }  # fmt: skip
    their_loss = DPOTrainer._compute_loss(stub, lambda **_: model_out, inputs, False)  # type: ignore[arg-type]
    (their_gradient,) = torch.autograd.grad(their_loss, logp)

    mask, sequence = MASK_BT.bool(), torch.arange(B).repeat_interleave(LENGTHS)
    mine = x["logp"].clone().requires_grad_()
    signs = torch.tensor([1.0] * half + [-1.0] * half, dtype=torch.float64)[sequence]
    weights, pair = torch.full_like(signs, 1 / half), (torch.arange(B) % half)[sequence]
    old = x["old"][mask]
    tokens = Tokens(mine[mask], old, old, signs, weights, sequence, x["reference"][mask], pair)
    loss = policy_loss(tokens, ObjectiveSection(name="dpo", beta=beta)).loss
    torch.testing.assert_close(loss.detach(), their_loss.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, mine)[0], their_gradient)


def test_a_completion_left_out_does_not_count_here_and_does_in_trl() -> None:
    """TRL takes its tokens out of the mask and still divides by all B sequences; here S is of those that are left."""
    x, known = rows(0), torch.tensor([True, True, False, True, True, True])
    _, gradient = ours(x, known)
    _, their_gradient = theirs(x, mask_BT=MASK_BT * known[:, None])
    torch.testing.assert_close(gradient, their_gradient * B / int(known.sum()))


def test_micro_batches_add_up_to_the_step_where_trl_knows_the_tokens_of_the_whole() -> None:
    """ "dapo" divides by the tokens of the step, as the token mean here; "bnpo" and "grpo" take a mean in each part."""
    x = rows(1)
    _, whole = ours(x, name="dapo")

    def in_parts(loss_type: str, share: float) -> Tensor:
        found = []
        for part in (slice(0, 2), slice(2, B)):
            cut = {name: tensor[part] for name, tensor in x.items()} | {"advantages": ADVANTAGES[part]}
            settings = {"loss_type": loss_type, "epsilon_high": 0.28, "items": int(MASK_BT.sum())}
            found.append(theirs(cut, mask_BT=MASK_BT[part], **settings)[1] * share)
        return torch.cat(found)

    torch.testing.assert_close(in_parts("dapo", 1.0), whole)
    assert not torch.allclose(in_parts("bnpo", 0.5), whole)
