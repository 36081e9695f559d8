"""`explain loss`: the completions of a batch add up to the loss that the run has logged, whatever the objective."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luciola.cli.explain import _remarks
from luciola.recipe import GrpoRecipe
from luciola.recipe.objective import NAMES
from luciola.rl.advantage import EPS
from luciola.rl.equation import equation
from luciola.rl.explain import Explanation, explain_loss
from luciola.rl.grpo import grpo

Make = Callable[..., GrpoRecipe]

P, G = 6, 16
ROLLOUT = {"prompts": P, "group_size": G, "max_tokens": 3}
SETTINGS: dict[str, dict[str, Any]] = {name: {"objective": {"name": name}} for name in NAMES} | {
    "off policy": {"grpo": {"steps": 4, "updates_per_rollout": 2, "epochs": 2}, "objective": {"clip_low": 0.001}},
    "replay": {
        "grpo": {"steps": 4, "replay": 0.5},
        "objective": {"importance_cap": 2.0, "off_policy_delta": 0.0001, "beta": 0.1, "kl": "unbiased"},
        "optim": {"lr": 3e-2},
    },
    "process": {"objective": {"supervision": "process"}},
    "sampling mask": {
        "rollout": ROLLOUT | {"top_k": 5},
        "objective": {"keep_sampling_mask": True},
    },
    "batch": {"objective": {"advantage": "batch", "overlong": "penalty"}, "reward": {"repetition": 0.1}},
    "refreshed reference": {"grpo": {"steps": 4, "reference_refresh": 2}, "objective": {"beta": 0.1, "kl": "k2"}},
}


def trained(recipe: Make, **changes: dict[str, Any]) -> Path:
    """Four steps, with checkpoints after the second and the fourth."""
    return grpo(
        recipe(**({"grpo": {"steps": 4}, "rollout": ROLLOUT, "evaluate": {"problems": 2, "samples": 0}} | changes))
    )


def logged(run: Path, step: int) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(float(record["loss"]) for record in records if record["step"] == step)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_completions_add_up_to_the_loss_that_was_logged(recipe: Make, name: str) -> None:
    run = trained(recipe, **SETTINGS[name])
    found = explain_loss(run)
    assert found.step == 3  # the one after the checkpoint beyond which the log goes on
    assert found.logged_loss == logged(run, 3)
    assert found.step_loss == pytest.approx(found.logged_loss, abs=1e-7)
    assert found.loss == pytest.approx(found.trainer_loss, abs=1e-6)
    assert found.agrees
    assert any(row.contribution for row in found.completions)
    assert found.loss == pytest.approx(math.fsum(row.contribution for row in found.completions))


def test_on_policy_a_completion_adds_minus_weight_times_advantage_times_tokens(recipe: Make) -> None:
    found = explain_loss(trained(recipe))
    looked_at = [row for row in found.completions if row.ratio is not None]
    assert looked_at
    for row in looked_at:
        assert row.ratio == pytest.approx(1.0, abs=1e-5)
        assert row.clipped == 0.0
        assert row.weight == pytest.approx(1 / (found.denominators["S"] * row.tokens))
        assert row.contribution == pytest.approx(-row.weight * row.advantage * row.tokens, rel=1e-4)


def groups(found: Explanation) -> list[list[Any]]:
    numbers = sorted({row.group for row in found.completions})
    return [[row for row in found.completions if row.group == g] for g in numbers]


def test_advantages_follow_from_the_rewards_that_are_shown(recipe: Make) -> None:
    for name in ("grpo", "dr_grpo", "rloo"):
        objective = {"name": name, "beta": 0.2} if name == "rloo" else {"name": name}
        found = explain_loss(trained(recipe, objective=objective, run={"name": name}))
        assert any(row.deviation for row in found.completions)
        for group in groups(found):
            rewards = [row.reward for row in group]
            for row in group:
                assert row.mean == pytest.approx(sum(rewards) / len(rewards))
                expected = {
                    "grpo": (row.reward - row.mean) / (row.deviation + EPS),
                    "dr_grpo": row.reward - row.mean,
                    "rloo": row.reward - (sum(rewards) - row.reward) / (len(rewards) - 1),
                }[name]
                assert row.advantage == pytest.approx(expected, abs=1e-5)
                if name == "grpo":
                    assert row.reward == pytest.approx(row.rewards["accuracy"] + 0.1 * row.rewards["format"])


def test_process_supervision_shows_the_rewards_of_steps_and_counts_groups_by_them(recipe: Make) -> None:
    found = explain_loss(trained(recipe, **SETTINGS["process"]))
    assert found.equation["reward"].startswith("r = ")
    for group in groups(found):
        every = torch.tensor([reward for row in group for reward in row.steps], dtype=torch.double)
        for row in group:
            assert (row.reward, row.rewards) == (None, None)
            assert row.mean == pytest.approx(float(every.mean()))
            assert row.deviation == pytest.approx(float(every.std()))
            credit = [(reward - row.mean) / (row.deviation + EPS) for reward in row.steps]
            if len(credit) == 1:
                assert row.advantage * credit[0] >= 0 and bool(row.advantage) == (abs(credit[0]) > 1e-9)
    flat = [not any(row.advantage for row in group) for group in groups(found)]
    assert found.groups_without_spread == pytest.approx(sum(flat) / P)
    assert sum(flat) < P


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_remark_on_ratios_of_one_does_not_take_replayed_groups_for_new_ones(recipe: Make, cap: float) -> None:
    still = {"optim": {"lr": 1e-9}, "objective": {"importance_cap": cap}}
    found = explain_loss(trained(recipe, grpo={"steps": 4, "replay": 1.0}, **still))
    assert sum(row.replayed for row in found.completions) == P * G
    (remark,) = (line for line in _remarks(found) if line.startswith("Every ratio is 1"))
    assert "these weights have sampled the new groups and " in remark
    assert ("pi_old of the replayed ones is theirs too" if cap else "hardly moved since") in remark


def test_later_optimiser_steps_show_ratios_that_left_one_and_what_the_clip_cuts(recipe: Make) -> None:
    found = explain_loss(trained(recipe, **SETTINGS["off policy"]))
    assert (found.optimizer_step, found.optimizer_steps) == (4, 4)
    assert len(found.completions) == P // 2 * G  # half of the groups
    assert any(abs(row.ratio - 1) > 1e-3 for row in found.completions if row.ratio is not None)
    assert any(row.clipped for row in found.completions)


def test_replayed_groups_are_marked_and_have_advantages_without_rewards(recipe: Make) -> None:
    found = explain_loss(trained(recipe, **SETTINGS["replay"]))
    stale = [row for row in found.completions if row.replayed]
    assert stale and len(stale) + P * G == len(found.completions)
    assert all(row.reward is None and row.importance is not None and row.importance <= 2.0 for row in stale)
    assert any(row.advantage for row in stale)


def test_pairs_carry_half_of_their_loss_each(recipe: Make) -> None:
    found = explain_loss(trained(recipe, **SETTINGS["dpo"]))
    paired = [row for row in found.completions if row.contribution]
    assert len(paired) == 2 * found.denominators["P"]
    assert sorted(row.advantage for row in paired) == [-1.0] * (len(paired) // 2) + [1.0] * (len(paired) // 2)


def test_without_a_logged_step_beyond_a_checkpoint_it_is_the_first_one(recipe: Make) -> None:
    run = trained(recipe, grpo={"steps": 2})
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
    found = explain_loss(run)
    assert (found.step, found.logged_loss) == (1, logged(run, 1))
    assert found.agrees


@pytest.mark.parametrize(
    ("name", "lack"),
    [("grpo", "all rewards are equal"), ("rft", "none is right"), ("dpo", "or none wrong")],
)
def test_the_remark_on_groups_that_teach_nothing_says_what_they_lack(recipe: Make, name: str, lack: str) -> None:
    objective = {"name": name} | ({"refills": 0} if name == "grpo" else {})
    found = explain_loss(trained(recipe, objective=objective))
    idle = [not any(row.advantage for row in group) for group in groups(found)]
    assert found.groups_without_spread == pytest.approx(sum(idle) / P)
    if any(idle):
        assert any(lack in remark for remark in _remarks(found))
    assert lack in found.lacking


def test_the_run_is_left_as_it_is(recipe: Make) -> None:
    run = trained(recipe)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    explain_loss(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_log_that_says_something_else_does_not_agree(recipe: Make) -> None:
    run = trained(recipe)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"] += 0.01
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not explain_loss(run).agrees


def test_equations_name_the_constants_of_the_recipe(recipe: Make) -> None:
    parts = equation(recipe(objective={"name": "dapo", "beta": 0.03}, rollout={"max_tokens": 10}))
    assert "clip(rho_t, 0.8, 1.28)" in parts["clip"]
    assert parts["KL"].startswith("D_t = e^d - d - 1") and parts["KL"].endswith("0.03")
    assert parts["loss"] == "- sum_t w (s_t - 0.03 D_t)"
    assert "sg[min(rho_t, 5)]" in equation(recipe(objective={"name": "cispo"}))["clip"]
    for name in NAMES:
        assert list(equation(recipe(objective={"name": name})))[-1] == "loss"
