"""The objective of a recipe as the equation it stands for, part by part, with its constants put in."""

from __future__ import annotations

from luciola.recipe import CriticSection, GrpoRecipe, ObjectiveSection, RewardSection
from luciola.rl.advantage import EPS

ADVANTAGES = {
    "group": f"A = (R - mean of its group) / (std of its group + {EPS:g})",
    "centred": "A = R - mean of its group",
    "leave_one_out": "A = R - mean of the others in its group",
    "batch": f"A = (R - mean of its group) / (std of the whole rollout + {EPS:g})",
    "global": f"A_t = (return_t - mean) / (std + {EPS:g}), both over all tokens of the rollout",
    "correct": "A = 1 for a right completion, 0 for any other",
    "pairs": "A = +1 for the right and -1 for the wrong completion of a pair, 0 without a partner",
}
PROCESS = (
    f"A_t = sum of (r - mean) / (std + {EPS:g}) over the steps that end at t or later; both over the group's steps"
)
RATIOS = {
    "token": "rho_t = pi(o_t) / pi_old(o_t)",
    "sequence_mean": "rho = (pi(o) / pi_old(o))^(1/|o|), the same for all tokens of a sequence",
    "sequence": "rho = pi(o) / pi_old(o), the same for all tokens of a sequence",
    "none": "none: log pi stands in its place",
}
KLS = {
    "k1": "D_t = -d",
    "k2": "D_t = d^2 / 2",
    "k3": "D_t = e^d - d - 1",
    "unbiased": "D_t = rho_t (e^d - d - 1)",
}
AGGREGATIONS = {
    "sequence": "w = 1 / (S |o|): the mean over sequences of token means",
    "token": "w = 1 / N: the mean over all tokens",
    "constant": "w = 1 / (S L): token sums over a length that never changes",
    "sequence_sum": "w = 1 / S: the mean over sequences of token sums",
}


def equation(recipe: GrpoRecipe) -> dict[str, str]:
    """Each part of the recipe's objective by name, in the order in which they are computed; the loss comes last."""
    objective = recipe.objective
    process = objective.supervision == "process"
    parts = {"reward": _of_step(objective) if process else _reward(recipe.reward, objective)}
    if recipe.critic is not None:
        parts["advantage"] = _gae(recipe.critic)
    else:
        parts["advantage"] = PROCESS if process else ADVANTAGES[objective.advantage]
    if objective.advantage == "pairs":
        return parts | {
            "margin": "h = sum_t log(pi(o_t) / pi_ref(o_t)) of a completion, h+ of the right and h- of the wrong one",
            "aggregation": "w = 1 / P: the mean over pairs",
            "loss": f"- sum over pairs of w log sigma({objective.beta:g} (h+ - h-))",
        }
    parts["ratio"] = RATIOS[objective.ratio]
    parts["clip"] = _clip(objective)
    if objective.off_policy_delta:
        parts["mask"] = (
            f"M = 0 where A < 0 and the sequence's mean log(pi_sampler / pi) > {objective.off_policy_delta:g}, else 1"
        )
    if objective.importance_cap:
        parts["importance"] = f"c_t = min(pi_old(o_t) / pi_sampler(o_t), {objective.importance_cap:g})"
    in_loss = objective.beta > 0 and objective.kl_in == "loss"
    if objective.beta:
        where = "in the loss" if in_loss else "in the reward, without gradient"
        parts["KL"] = f"{KLS[objective.kl]}, d = log(pi_ref(o_t) / pi(o_t)); {where}, weighed with {objective.beta:g}"
    parts["aggregation"] = AGGREGATIONS[objective.aggregation]
    factors = " ".join(["M"] * bool(objective.off_policy_delta) + ["c_t"] * bool(objective.importance_cap) + ["s_t"])
    parts["loss"] = f"- sum_t w ({factors} - {objective.beta:g} D_t)" if in_loss else f"- sum_t w {factors}"
    return parts


def denominators(objective: ObjectiveSection, sequences: int, tokens: int, pairs: int, longest: int) -> dict[str, int]:
    """The numbers that the loss of an optimiser step is divided by, under the names that `equation` gives them."""
    if objective.advantage == "pairs":
        return {"P": pairs}
    match objective.aggregation:
        case "token":
            return {"N": tokens}
        case "constant":
            return {"S": sequences, "L": longest}
    return {"S": sequences}


def _gae(critic: CriticSection) -> str:
    step = f"r_t + {critic.gamma:g} V_(t+1) - V_t"
    return (
        f"A_t = (G_t - mean) / (std + {EPS:g}), both over all tokens of the rollout; "
        f"G_t = {step} + {critic.gamma * critic.lam:g} G_(t+1), V the critic's values"
    )


def _reward(section: RewardSection, objective: ObjectiveSection) -> str:
    weights: dict[str, float] = {"accuracy": section.accuracy, "format": section.format, "length": section.length}
    weights |= {"repetition": section.repetition, "language": section.language} | section.own
    text = "R = " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
    if objective.overlong == "penalty":
        text += " - up to 1 for a long completion"
    if objective.overlong == "mask":
        text += "; not known where the completion was cut"
    if objective.beta and objective.kl_in == "reward":
        later = " and all later ones" if objective.advantage == "global" else "s"
        text += f" - {objective.beta:g} sum of the KL estimates of the token{later}"
    return text


def _of_step(objective: ObjectiveSection) -> str:
    text = "r = what the task gives for each step"
    return text + "; not known where the completion was cut" if objective.overlong == "mask" else text


def _clip(objective: ObjectiveSection) -> str:
    if objective.clip == "none":
        return "none: s_t = A log pi(o_t)" if objective.ratio == "none" else "none: s_t = rho_t A"
    if objective.clip == "weight":
        return f"s_t = sg[min(rho_t, {1 + objective.clip_high:g})] A log pi(o_t); sg: taken as a constant"
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    return f"s_t = min(rho_t A, clip(rho_t, {low:g}, {high:g}) A)"
