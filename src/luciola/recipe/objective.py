"""[objective]: which reinforcement learning objective, and each of its parts.

An objective is a choice for each part that all of them share: what the advantage compares, whose probability ratio it
weighs, how that is clipped, where the KL divergence from the reference enters, over what the loss is averaged. A name
stands for one such choice, and a part that is given goes before the name's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Advantage = Literal["group", "centred", "leave_one_out", "batch", "global", "correct", "pairs", "critic"]
Ratio = Literal["token", "sequence_mean", "sequence", "none"]
Clip = Literal["ppo", "weight", "none"]
Aggregation = Literal["sequence", "token", "constant", "sequence_sum"]
Kl = Literal["k1", "k2", "k3", "unbiased"]

# What each name changes about GRPO, whose parts are the defaults below.
NAMES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "centred", "aggregation": "constant"},
    "dapo": {"clip_high": 0.28, "aggregation": "token", "refills": 4, "overlong": "penalty"},
    "gspo": {"ratio": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip": "weight", "clip_high": 4.0, "aggregation": "token"},
    "rloo": {"advantage": "leave_one_out", "ratio": "sequence", "beta": 0.05, "kl": "k1", "kl_in": "reward"},
    "reinforce++": {"advantage": "global", "aggregation": "token", "beta": 0.01, "kl": "k1", "kl_in": "reward"},
    "ppo": {"advantage": "critic", "kl": "k1", "kl_in": "reward"},
    "rft": {"advantage": "correct", "ratio": "none", "clip": "none"},
    "dpo": {"advantage": "pairs", "ratio": "none", "clip": "none", "beta": 0.1},
}
# Advantages that are made from verdicts alone, whatever the rewards.
IMITATION: dict[str, str] = {"correct": "right answers alone", "pairs": "right against wrong answers alone"}
NEEDS_GROUP = ("group", "centred", "leave_one_out", "batch", "pairs")  # advantages that compare within a group


class ObjectiveSection(BaseModel):
    """What is maximised. `name` sets every part below; those that are given go before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo", "rft", "dpo"] = Field(
        "grpo", description="the objective that sets the parts which are not given"
    )
    advantage: Advantage = Field(
        "group",
        description="group: (R - mean) / std of the group (GRPO); centred: no std (Dr. GRPO, V3.2); leave_one_out: "
        "minus the mean of the others (RLOO); batch: minus the group's mean, by the rollout's std; global: minus mean "
        "and by std of the whole rollout (REINFORCE++); correct: 1 for right answers, else 0 (rejection fine-tuning); "
        "pairs: right against wrong answers of a group (DPO); critic: generalised estimates by a value model, "
        "set in [critic] (PPO)",
    )
    supervision: Literal["outcome", "process"] = Field(
        "outcome",
        description="outcome: the sum of [reward]; process: instead of it each step's own reward, from tasks that "
        "grade steps (DeepSeekMath, 4.1.3); accuracy and format are then only logged",
    )
    ratio: Ratio = Field(
        "token",
        description="pi / pi_old of: each token; sequence_mean: the sequence, geometric mean (GSPO); sequence: the "
        "whole sequence, product (RLOO); none: log pi itself stands in its place",
    )
    clip: Clip = Field(
        "ppo",
        description="ppo: the smaller of clipped and unclipped; weight: log pi weighted with the capped ratio (CISPO); "
        "none: unclipped",
    )
    clip_low: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="the ratio is clipped below at 1 - clip_low")
    clip_high: Amount = Field(0.2, description="and above at 1 + clip_high (DAPO: clip-higher)")
    beta: Amount = Field(0.0, description="weight of the KL divergence from the reference; 0: none is kept")
    kl: Kl = Field(
        "k3",
        description="its estimator from a token, d = log pi_ref - log pi: k1 = -d; k2 = d^2/2; k3 = e^d - d - 1 "
        "(DeepSeekMath, eq. 4); unbiased = k3 pi/pi_old (V3.2)",
    )
    kl_in: Literal["loss", "reward"] = Field("loss", description="where it enters: the loss, or without gradient (k1)")
    aggregation: Aggregation = Field(
        "sequence",
        description="the loss is: sequence: the mean over sequences of token means (the papers); token: the mean over "
        "all tokens (DAPO); constant: token sums / (sequences * rollout.max_tokens) (Dr. GRPO); sequence_sum: the mean "
        "over sequences of token sums",
    )
    refills: Annotated[int, Field(ge=0)] = Field(
        0,
        description="dynamic sampling: rounds at most in which groups that teach nothing give way to new problems",
    )
    overlong: Literal["keep", "penalty", "mask"] = Field(
        "keep",
        description="long completions: keep; penalty: reward falls by up to 1 (DAPO); mask: cut ones are left out",
    )
    overlong_buffer: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="the penalty grows over this last share of rollout.max_tokens"
    )
    importance_cap: Amount = Field(
        0.0, description="replayed groups weigh min(pi_old / pi_sampler, this) a token; 0: no such weight"
    )
    off_policy_delta: Amount = Field(
        0.0,
        description="sequences of negative advantage whose mean log(pi_sampler / pi) exceeds this are left out (V3.2); "
        "0: none",
    )
    keep_sampling_mask: bool = Field(
        False, description="probabilities are taken among the tokens that top_p and top_k left when sampling (V3.2)"
    )

    @model_validator(mode="before")
    @classmethod
    def _parts_of_the_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("name", "grpo") not in NAMES:
            return data  # the name's own check says what is wrong
        name = data.get("name", "grpo")
        for other, parts in NAMES.items():
            # The recipe of a run writes every part out: another name on top of it would change nothing else.
            if other != name and {**_defaults(), **parts}.items() <= data.items():
                raise ValueError(
                    f"has name = '{name}' but writes out every part of '{other}'; delete the parts, or the name"
                )
        unused = {}
        if {**NAMES[name], **data}.get("clip") == "weight":
            unused = {"clip_low": 0.0}
        elif {**NAMES[name], **data}.get("clip") == "none":
            unused = {"clip_low": 0.0, "clip_high": 0.0}
        return {**unused, **NAMES[name], **data}

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        contradictions = [
            (self.ratio == "none" and self.clip != "none", "ratio = 'none' leaves nothing to clip: set clip = 'none'"),
            (
                self.clip == "weight" and self.clip_low > 0,
                "clip = 'weight' has no lower bound: leave clip_low out or set it to 0",
            ),
            (
                self.clip == "none" and (self.clip_low > 0 or self.clip_high > 0),
                "clip = 'none' clips nothing: leave clip_low and clip_high out, or set clip = 'ppo'",
            ),
            (
                self.kl_in == "reward" and self.kl != "k1",
                f"kl_in = 'reward' has no gradient, which kl = '{self.kl}' is made for: set kl = 'k1'",
            ),
            (
                self.kl_in == "loss" and self.kl == "k1" and self.beta > 0,
                "kl = 'k1' in the loss has a gradient whose mean is 0 and so holds nothing: set kl = 'k3' or 'k2', "
                "or kl_in = 'reward'",
            ),
            (
                self.kl == "unbiased" and self.ratio != "token",
                f"kl = 'unbiased' weighs each token with its own ratio: set ratio = 'token' instead of '{self.ratio}'",
            ),
            (
                self.supervision == "process" and self.advantage != "group",
                f"supervision = 'process' normalises steps over the group: set advantage = 'group' instead of "
                f"'{self.advantage}'",
            ),
            (
                self.supervision == "process" and self.kl_in == "reward",
                "supervision = 'process' has no outcome reward to put the KL into: set kl_in = 'loss'",
            ),
            (
                self.supervision == "process" and self.overlong == "penalty",
                "supervision = 'process' has no outcome reward to take the penalty from: set overlong = 'keep'",
            ),
        ]
        if self.advantage in IMITATION:
            what = IMITATION[self.advantage]
            contradictions += [
                (
                    self.overlong == "penalty",
                    f"advantage = '{self.advantage}' learns from {what}, not from rewards to take the penalty from: "
                    "set overlong = 'keep' or 'mask'",
                ),
                (
                    self.kl_in == "reward",
                    f"advantage = '{self.advantage}' learns from {what}, not from rewards to put the KL into: set "
                    "kl_in = 'loss'",
                ),
            ]
        if self.advantage == "correct":
            contradictions += [
                (
                    self.off_policy_delta > 0,
                    "advantage = 'correct' (rejection fine-tuning) is never negative, and off_policy_delta leaves out "
                    "nothing else: leave it out",
                ),
            ]
        if self.advantage == "critic":
            contradictions += [
                (
                    self.ratio in ("sequence", "sequence_mean"),
                    f"advantage = 'critic' (PPO) values every token by itself: set ratio = 'token' instead of "
                    f"'{self.ratio}'",
                ),
            ]
        if self.advantage == "pairs":
            contradictions += [
                (self.ratio != "none", "advantage = 'pairs' (DPO) has no ratio: set ratio = 'none'"),
                (self.beta == 0, "advantage = 'pairs' (DPO) measures against a reference: set beta above 0"),
                (
                    (self.kl, self.kl_in, self.aggregation) != ("k3", "loss", "sequence"),
                    "advantage = 'pairs' (DPO) is a mean over pairs: leave kl, kl_in and aggregation out",
                ),
                (
                    self.importance_cap > 0 or self.off_policy_delta > 0,
                    "advantage = 'pairs' (DPO) has no ratio to correct: leave importance_cap and off_policy_delta out",
                ),
            ]
        for wrong, sentence in contradictions:
            if wrong:
                raise ValueError(sentence)
        return self


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in ObjectiveSection.model_fields.items() if name != "name"}
