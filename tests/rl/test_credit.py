"""From rewards to advantages: steps, long completions, groups without a difference, empty ones, the sampling mask."""

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from luciola.engine.engine import Completion, Engine
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.recipe import GrpoRecipe, RecipeError, check
from luciola.recipe.objective import NAMES
from luciola.rl.advantage import EPS, overlong_penalty, process_advantages
from luciola.rl.batch import per_sample
from luciola.rl.credit import sequences, shaped_rewards
from luciola.rl.ppo import Critic
from luciola.rl.rollout import Rollout, rollout, step_ends
from luciola.rl.update import update
from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import Problem
from luciola.train.optim import Optimizer
from luciola.verify.verdict import Verdict

Make = Callable[..., GrpoRecipe]


def by_hand(
    rewards: list[list[float]], ids: list[list[list[int]]], *, cut: Sequence[tuple[int, int]] = (), length: int = 4
) -> Rollout:
    """A rollout of these rewards and tokens; completions at the places `cut` ran into the limit."""
    completions = [
        [
            Completion("", tokens, "length" if (p, g) in cut else "stop", [-1.0] * len(tokens), [-1.0] * len(tokens))
            for g, tokens in enumerate(group)
        ]
        for p, group in enumerate(ids)
    ]
    prompts = [[7 + p] * length for p in range(len(ids))]
    verdicts = [[Verdict("correct" if reward > 0 else "wrong", reward) for reward in group] for group in rewards]
    known = torch.ones(len(rewards), len(rewards[0]), dtype=torch.bool)
    return Rollout([], prompts, completions, verdicts, {}, torch.tensor(rewards), known, 0.0, 0.0)


def advantages(found: Rollout, recipe: GrpoRecipe) -> list[list[float]]:
    return [sample.advantages_T.tolist() for sample in sequences(found, recipe)]


# Process supervision


def test_a_token_is_credited_with_its_own_step_and_all_later_ones() -> None:
    """Step rewards 1, 0 and 1, 1: mean 3/4, deviation 1/2; a right step is worth 1/2, a wrong one -3/2."""
    steps = [[(1, 1.0), (3, 0.0)], [(0, 1.0), (2, 1.0)]]
    first, second = process_advantages(steps, [4, 4], [True, True])
    unit = 0.25 / (0.5 + EPS)
    assert first.tolist() == pytest.approx([-2 * unit, -2 * unit, -3 * unit, -3 * unit], rel=1e-5)
    assert second.tolist() == pytest.approx([2 * unit, unit, unit, 0.0], rel=1e-5)


def test_steps_of_unknown_completions_neither_learn_nor_count() -> None:
    steps = [[(1, 1.0)], [(1, 0.0)], [(0, 100.0)]]
    with_unknown = process_advantages(steps, [2, 2, 2], [True, True, False])
    without = process_advantages(steps[:2], [2, 2], [True, True])
    assert with_unknown[2].tolist() == [0.0, 0.0]
    assert [a.tolist() for a in with_unknown[:2]] == [a.tolist() for a in without]
    assert all(not bool(a.any()) for a in process_advantages([[(0, 0.3)]] * 3, [2] * 3, [True] * 3))


def test_a_step_ends_at_the_token_that_holds_its_last_character(lm: LanguageModel) -> None:
    assert lm.tokenizer is not None
    ids = lm.tokenizer.encode("1+2=3")
    assert step_ends(lm.tokenizer, ids, [(3, 1.0), (5, 0.5), (99, 0.25)]) == [(2, 1.0), (4, 0.5), (4, 0.25)]
    assert step_ends(lm.tokenizer, [], [(0, 1.0)]) == []


def test_graded_steps_reach_the_tokens(recipe: Make) -> None:
    chosen = recipe(rollout={"prompts": 1, "group_size": 2}, objective={"supervision": "process"})
    found = by_hand([[1.0, 0.0]], [[[1, 2, 3], [1, 2]]])
    found.steps = [[[(0, 1.0), (2, 1.0)], [(0, 1.0), (1, 0.0)]]]
    right, wrong = advantages(found, chosen)
    assert right[0] > right[1] == right[2] > 0
    assert wrong[0] > wrong[1] and wrong[1] < 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"overlong": "penalty"}}, "no outcome reward to take the penalty from: set overlong = 'keep'"),
        ({"objective": {"name": "dapo"}}, "no outcome reward to take the penalty from"),
        ({"reward": {"length": 0.1}}, r"reward\.length would be ignored"),
        ({"reward": {"repetition": 0.1}}, r"reward\.repetition would be ignored"),
        ({"reward": {"language": 0.1}}, r"reward\.language would be ignored"),
        (
            {"reward": {"own": {"mine:words": -0.5}}},
            r"reward\.own would be ignored: objective\.supervision = 'process'",
        ),
    ],
)
def test_what_process_supervision_would_ignore_is_refused(
    recipe: Make, changes: dict[str, dict[str, Any]], reason: str
) -> None:
    recipe(**changes)  # in itself it is fine
    with pytest.raises(RecipeError, match=reason):
        recipe(**changes | {"objective": changes.get("objective", {}) | {"supervision": "process"}})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "rft",
            {"reward": {"own": {"mine:words": 0.5}}},
            r"reward\.own would be ignored: .*'correct' learns from right",
        ),
        ("dpo", {"reward": {"own": {"mine:words": 0.5}}}, r"reward\.own would be ignored: .*'pairs' learns from right"),
        ("rft", {"reward": {"length": 0.1}}, r"reward\.length would be ignored"),
        ("rft", {"objective": {"overlong": "penalty"}}, "not from rewards to take the penalty from"),
        ("dpo", {"objective": {"overlong": "penalty"}}, "not from rewards to take the penalty from"),
        ("rft", {"objective": {"beta": 0.1, "kl_in": "reward", "kl": "k1"}}, "not from rewards to put the KL into"),
        ("rft", {"objective": {"off_policy_delta": 0.1}}, "never negative, and off_policy_delta"),
    ],
)
def test_what_verdicts_alone_would_ignore_is_refused(
    recipe: Make, name: str, changes: dict[str, dict[str, Any]], reason: str
) -> None:
    recipe(**changes)  # for GRPO it is fine
    with pytest.raises(RecipeError, match=reason):
        recipe(**changes | {"objective": changes.get("objective", {}) | {"name": name}})


def test_a_run_with_process_supervision_can_be_read_back_from_all_its_settings(recipe: Make) -> None:
    chosen = recipe(objective={"supervision": "process", "overlong": "mask"}, reward={"own": {"mine:words": 0.0}})
    assert check(GrpoRecipe, json.loads(chosen.model_dump_json(exclude_none=True)), "resolved") == chosen


# Long completions


def test_the_penalty_grows_evenly_over_the_buffer() -> None:
    """DAPO: longest 20, buffer 4: nothing up to 16 tokens, then a quarter for each."""
    lengths = torch.tensor([[1, 16, 17, 18, 19, 20, 25]])
    assert overlong_penalty(lengths, 20, 4)[0].tolist() == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


def test_overlong_completions_are_kept_punished_or_left_out(recipe: Make) -> None:
    found = by_hand([[1.0, 1.0, 0.0]], [[[1] * 10, [1] * 9, [1] * 3]], cut=[(0, 0)])
    expected = {
        "keep": ([1.0, 1.0, 0.0], [True, True, True]),
        "penalty": ([0.0, 0.5, 0.0], [True, True, True]),
        "mask": ([1.0, 1.0, 0.0], [False, True, True]),
    }
    for overlong, (rewards, known) in expected.items():
        size = {"prompts": 1, "group_size": 3, "max_tokens": 10}
        chosen = recipe(rollout=size, objective={"overlong": overlong, "overlong_buffer": 0.2})
        rewards_PG, known_PG = shaped_rewards(found, chosen)
        assert rewards_PG[0].tolist() == pytest.approx(rewards)
        assert known_PG[0].tolist() == known
        given = advantages(found, chosen)
        assert any(given[0]) is (overlong != "mask")
    assert found.rewards_PG.tolist() == [[1.0, 1.0, 0.0]]  # what is logged is what was earned


# Dynamic sampling


class Marked(Arithmetic):
    """Arithmetic that finds the word "right" right."""

    def grade(self, problem: Problem, completion: str) -> Verdict:
        return Verdict("correct", 1.0) if completion == "right" else Verdict("wrong", 0.0)


class Rounds:
    """An engine whose completions of call r are all equal but in the groups `mixed[r]`, and which notes its prompts."""

    def __init__(self, mixed: Sequence[Sequence[int]]) -> None:
        self.mixed, self.calls, self.seeds = mixed, [], []

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], **_: Any) -> list[list[Completion]]:
        useful = self.mixed[len(self.calls)] if len(self.calls) < len(self.mixed) else ()
        self.calls.append(prompts)
        self.seeds += [p.seed for p in params]

        def text(p: int, g: int) -> str:
            return "right" if p in useful and g == 0 else "no"

        return [
            [Completion(text(p, g), [1, 2], "stop", [0.0] * 2, [0.0] * 2) for g in range(given.n)]
            for p, given in enumerate(params)
        ]


def refilled(lm: LanguageModel, recipe: Make, mixed: Sequence[Sequence[int]], refills: int) -> tuple[Rollout, Rounds]:
    assert lm.tokenizer is not None
    chosen = recipe(rollout={"prompts": 4, "group_size": 2}, objective={"refills": refills})
    chosen = chosen.model_copy(update={"task": Marked(max_value=99)})
    engine = Rounds(mixed)
    return rollout(engine, lm.tokenizer, chosen, 3), engine  # type: ignore[arg-type]


def test_refilling_stops_at_its_bound_and_keeps_what_there_is(lm: LanguageModel, recipe: Make) -> None:
    found, engine = refilled(lm, recipe, mixed=[], refills=3)
    assert [len(call) for call in engine.calls] == [4, 4, 4, 4]
    assert len(set(engine.seeds)) == 16
    assert found.refilled == 0 and len(found.prompts) == 4
    assert found.prompts == engine.calls[0]
    assert "groups/refilled" not in found.metrics()


def test_groups_without_a_difference_give_way_to_new_problems_in_their_place(lm: LanguageModel, recipe: Make) -> None:
    found, engine = refilled(lm, recipe, mixed=[[1], [0, 2], [0], [0]], refills=3)
    assert [len(call) for call in engine.calls] == [4, 3, 1]  # three places to fill, then one, then none
    first, second, third = engine.calls
    assert found.prompts == [second[0], first[1], second[2], third[0]]
    assert found.refilled == found.metrics()["groups/refilled"] == 3
    assert found.rewards_PG[:, 0].tolist() == pytest.approx([1.0] * 4)
    assert [problem.prompt for problem in found.problems] != [found.problems[0].prompt] * 4
    assert found.parts["accuracy"].tolist() == [[1.0, 0.0]] * 4


def test_no_refill_where_every_group_has_a_difference_or_none_is_asked_for(lm: LanguageModel, recipe: Make) -> None:
    assert len(refilled(lm, recipe, mixed=[[0, 1, 2, 3]], refills=3)[1].calls) == 1
    assert len(refilled(lm, recipe, mixed=[], refills=0)[1].calls) == 1


# Empty completions, and steps in which there is nothing to learn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rewards", [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], ids=["some", "all wrong"])
def test_empty_completions_and_equal_rewards_leave_finite_weights(
    lm: LanguageModel, recipe: Make, name: str, rewards: list[list[float]]
) -> None:
    chosen = recipe(
        rollout={"prompts": 2, "group_size": 2, "max_tokens": 10},
        objective={"name": name},
        grpo={"replay_routes": False},
        optim={"weight_decay": 0},
    )
    found = by_hand(rewards, [[[8, 9], []], [[], [9, 8, 9]]])
    model = copy.deepcopy(lm.model)
    reference = copy.deepcopy(lm.model).requires_grad_(False) if chosen.objective.beta else None
    critic = None if chosen.critic is None else Critic(model, chosen)
    metrics = update(model, Optimizer(model, chosen.optim), reference, found, chosen, 0, 1e-3, critic=critic)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert metrics["groups/without_spread"] == (0.0 if rewards[0][0] or name == "ppo" else 1.0)
    moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), lm.model.parameters(), strict=True))
    alone = name == "dpo"  # an empty completion is nobody's partner
    in_reward = name in ("rloo", "reinforce++")  # the KL divergence tells completions apart as well
    assert moved is (bool(rewards[0][0]) and not alone) or in_reward


# The kept sampling mask


def test_kept_probabilities_are_the_engine_s_and_those_of_the_masked_softmax(lm: LanguageModel, recipe: Make) -> None:
    size = {"prompts": 3, "group_size": 4, "max_tokens": 6, "top_k": 4, "top_p": 0.9, "temperature": 0.8}
    chosen = recipe(rollout=size, objective={"keep_sampling_mask": True})
    assert lm.tokenizer is not None
    found = rollout(Engine(lm, dtype="model"), lm.tokenizer, chosen, 0)
    samples = sequences(found, chosen)
    logp = per_sample(lm.model, samples, chosen)
    for sample in samples:
        torch.testing.assert_close(logp[id(sample)], torch.tensor(sample.old_logp), atol=1e-5, rtol=1e-5)
        assert sample.kept is not None and all(1 <= len(ids) <= 4 for ids in sample.kept)
        row = torch.tensor([sample.prompt + sample.completion])
        logits_TV: Tensor = lm.model(row)[0, len(sample.prompt) - 1 : -1].detach() / 0.8
        masked = torch.full_like(logits_TV, -torch.inf)
        for t, ids in enumerate(sample.kept):
            masked[t, ids.long()] = logits_TV[t, ids.long()]
        expected = masked.log_softmax(-1).gather(1, torch.tensor(sample.completion)[:, None])[:, 0]
        torch.testing.assert_close(logp[id(sample)], expected, atol=1e-4, rtol=1e-4)
    assert any(len(ids) > 1 for sample in samples for ids in sample.kept or ())


def test_without_the_mask_a_truncated_rollout_is_off_policy_at_once(lm: LanguageModel, recipe: Make) -> None:
    """What the sampler kept has more probability there than under pi; the mask takes that difference out."""
    size = {"prompts": 4, "group_size": 8, "max_tokens": 3, "top_k": 3}
    kl: dict[bool, Any] = {}
    for keep in (True, False):
        chosen = recipe(rollout=size, objective={"keep_sampling_mask": keep})
        assert lm.tokenizer is not None
        found = rollout(Engine(lm, dtype="model"), lm.tokenizer, chosen, 0)
        sample = sequences(found, chosen)[0]
        kl[keep] = sum(sample.sampler_logp)
    assert kl[True] > kl[False]
