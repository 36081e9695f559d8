"""The pipeline's recipe: stage tables become ordinary recipes, and a mistake is answered with the stage's name."""

import json
from pathlib import Path
from typing import Any

import pytest

from luciola.recipe import GrpoRecipe, PipelineRecipe, RecipeError, RejectionRecipe, SftRecipe, check, load, shipped
from luciola.recipe.pipeline import STAGES, Stage, plan

SHIPPED = ("r1", "r1-smollm2", "smollm2-countdown", "deepseek-r1")


def resolved(*overrides: str, name: str = "r1", skip: tuple[str, ...] = ()) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan(load(PipelineRecipe, name, overrides), name, skip)}


def message(*overrides: str, **options: Any) -> str:
    with pytest.raises(RecipeError) as failure:
        resolved(*overrides, **options)
    text = str(failure.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pipelines_resolve_to_ordinary_recipes(name: str) -> None:
    stages = resolved(name=name)
    assert [name for name in STAGES if name in stages] == list(stages)
    for stage in stages.values():
        written = json.loads(stage.recipe.model_dump_json(exclude_none=True))
        assert check(type(stage.recipe), written, "again") == stage.recipe
        assert stage.recipe.run.name == stage.name


def test_each_stage_starts_where_the_paper_says() -> None:
    stages = resolved("run.folder=all", "run.name=mine")
    assert {name: stage.start for name, stage in stages.items()} == {
        "base": None,
        "cold_start": "base",
        "reasoning_rl": "cold_start",
        "rejection": "reasoning_rl",
        "sft": "base",
        "rl_all": "sft",
        "student_base": None,
        "distill": "student_base",
        "student_rl": "student_base",
    }
    for name in ("sft", "distill"):
        recipe = stages[name].recipe
        assert isinstance(recipe, SftRecipe)
        assert recipe.data.paths == ["all/mine/rejection/sft.jsonl"]
    assert stages["sft"].recipe.model.path == "all/mine/base"
    assert stages["sft"].folder == Path("all/mine/sft")


def test_what_a_stage_does_not_set_it_shares() -> None:
    stages = resolved("seed=7", "sft.seed=8", "run.checkpoint_every=3")
    assert stages["base"].recipe.seed == 7 and stages["sft"].recipe.seed == 8
    assert stages["distill"].recipe.run.checkpoint_every == 3
    rl_all, reasoning = stages["rl_all"].recipe, stages["reasoning_rl"].recipe
    assert isinstance(rl_all, GrpoRecipe) and isinstance(reasoning, GrpoRecipe)
    assert rl_all.task.name == "mixture" and rl_all.task != reasoning.task


def test_skipping_hands_on_the_model_before() -> None:
    assert resolved(skip=("cold_start",))["reasoning_rl"].start == "base"
    assert resolved(skip=("sft",))["rl_all"].start == "reasoning_rl"
    assert "it reads what rejection makes" in message(skip=("rejection",))
    assert resolved(skip=("rejection", "sft", "distill"))["rl_all"].start == "reasoning_rl"
    assert "no stage cold_strat; did you mean cold_start?" in message(skip=("cold_strat",))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cold_start.stpes=3", "stage cold_start: unknown key stpes; did you mean steps?"),
        ("rl_all.grpo.steps=0", "stage rl_all: grpo.steps = 0 must be at least 1"),
        ("rejection.select.languge=0.5", "stage rejection: unknown key select.languge; did you mean select.language?"),
        ("distill.run.name=mine", "stage distill: the run of a stage is named by the pipeline"),
        ("sft.model.path=here", "stage sft: the pipeline gives this stage its model"),
        ("rejection.general.paths=['x']", "stage rejection: [general]: give exactly one of task"),
        ("model.path=here", "give one of [base] (pre-train a model) and model.path (a stored one), not both"),
        ("colt_start.steps=3", "unknown key colt_start; did you mean cold_start?"),
        ("sft=3", "sft = 3 must be a table"),
    ],
)
def test_a_mistake_names_its_stage(override: str, expected: str) -> None:
    assert expected in message(override)


def test_a_pipeline_without_a_model_is_refused() -> None:
    assert "no model to start from, which base would make" in message(skip=("base",))
    assert "no model to start from, which student_base would make" in message(skip=("student_base",))


def test_the_published_hyperparameters() -> None:
    stages = resolved(name="deepseek-r1")
    rl, sampled, sft = (stages[name].recipe for name in ("reasoning_rl", "rejection", "sft"))
    assert isinstance(rl, GrpoRecipe) and isinstance(sampled, RejectionRecipe) and isinstance(sft, SftRecipe)
    assert (rl.optim.lr, rl.objective.beta, rl.rollout.temperature) == (3e-6, 0.001, 1.0)
    assert (rl.rollout.prompts * rl.rollout.group_size, rl.grpo.updates_per_rollout) == (8192, 16)
    assert (rl.rollout.group_size, rl.grpo.epochs, rl.objective.clip_high) == (16, 1, 10)
    # The policy becomes the reference every 400 updates.
    assert rl.grpo.reference_refresh * rl.grpo.updates_per_rollout == 400
    assert sft.steps * sft.data.batch_size * sft.accumulate == 2 * 800_000
    assert (sft.optim.lr, sft.optim.final_lr_ratio, sft.optim.schedule) == (5e-5, 0.1, "cosine")


def test_the_recipe_is_told_from_those_of_other_commands() -> None:
    for Model, name, command in ((GrpoRecipe, "r1", "r1"), (PipelineRecipe, "quickstart", "grpo")):
        with pytest.raises(RecipeError, match=f"is a recipe for `luciola {command}`"):
            load(Model, name)
    assert {f"{name}.toml" for name in SHIPPED} <= {path.name for path in shipped().glob("*.toml")}
