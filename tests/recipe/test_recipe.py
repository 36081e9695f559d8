"""Recipes: reading, overriding, and above all what a person is told about a mistake."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from luciola.recipe import (
    GrpoRecipe,
    ObjectiveSection,
    PipelineRecipe,
    PretrainRecipe,
    RecipeError,
    RejectionRecipe,
    SftRecipe,
    check,
    documented_keys,
    load,
    resolve,
    shipped,
    to_toml,
)
from luciola.recipe.objective import NAMES

PRETRAIN = """
steps = 10
[run]
name = "tiny"
[model.config]
hidden_size = 8
[tokenizer]
kind = "characters"
[data]
source = "files"
paths = ["text.txt"]
"""


@pytest.fixture
def tiny(workplace: Path) -> Path:
    path = workplace / "tiny.toml"
    path.write_text(PRETRAIN)
    return path


def message(Model: type[BaseModel], name: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as failure:
        load(Model, name, overrides)
    text = str(failure.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", sorted(shipped().glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_come_back_from_their_resolved_form(path: Path) -> None:
    table = tomllib.loads(path.read_text())
    kinds = {"grpo": GrpoRecipe, "tokenizer": PretrainRecipe, "reasoning_rl": PipelineRecipe}
    Model = next((kinds[key] for key in kinds if key in table), SftRecipe)
    recipe = load(Model, path)
    assert check(Model, tomllib.loads(to_toml(recipe)), "resolved") == recipe


def test_a_shipped_recipe_is_found_by_its_name(workplace: Path) -> None:
    expected = shipped() / "quickstart.toml"
    assert resolve("quickstart") == resolve("quickstart.toml") == resolve("recipes/quickstart.toml") == expected
    own = workplace / "quickstart.toml"
    own.write_text(PRETRAIN)
    assert resolve("quickstart.toml") == Path("quickstart.toml"), "a file that is there goes before a shipped one"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("steps = 7", "steps", 7),
        ("run.name=try2", "run.name", "try2"),
        ("run.name=7", "run.name", "7"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name=true", "run.name", "true"),
        ("run.name='quoted'", "run.name", "quoted"),
        ("run.folder=a=b", "run.folder", "a=b"),
        ("run.folder=~/runs", "run.folder", str(Path.home() / "runs")),
        ("run.tensorboard=true", "run.tensorboard", True),
        ("optim.betas=[0, 0.99]", "optim.betas", (0.0, 0.99)),
        ('data.paths=["a", "b"]', "data.paths", ["a", "b"]),
        ("model.config.hidden_size=16", "model.config", {"hidden_size": 16}),
    ],
)
def test_overrides_are_toml_values_or_else_text(tiny: Path, override: str, path: str, value: object) -> None:
    recipe: object = load(PretrainRecipe, tiny, [override])
    for part in path.split("."):
        recipe = getattr(recipe, part)
    assert recipe == value
    assert type(recipe) is type(value)


def test_another_objective_on_the_command_line_starts_from_its_name_alone() -> None:
    shipped_section = load(GrpoRecipe, "quickstart").objective
    assert (shipped_section.clip_high, shipped_section.aggregation) == (0.28, "token")
    for name in NAMES.keys() - {"grpo"}:
        section = load(GrpoRecipe, "quickstart", [f"objective.name={name}"]).objective
        assert section == ObjectiveSection(name=name), name
    assert load(GrpoRecipe, "quickstart", ["objective.name=grpo"]).objective == shipped_section
    for overrides in (
        ["objective.clip_high=5e-4", "objective.name=gspo"],
        ["objective.name=gspo", "objective.clip_high=5e-4"],
    ):
        section = load(GrpoRecipe, "quickstart", overrides).objective
        assert section == ObjectiveSection(name="gspo", clip_high=5e-4)


def test_a_stage_of_a_pipeline_takes_another_objective_too() -> None:
    overridden = load(PipelineRecipe, "r1", ["reasoning_rl.objective.name=cispo"])
    assert overridden.reasoning_rl["objective"] == {"name": "cispo"}
    assert overridden.rl_all == load(PipelineRecipe, "r1").rl_all


def test_an_override_makes_the_section_it_needs(tiny: Path) -> None:
    assert "optim" not in tomllib.loads(PRETRAIN)
    assert load(PretrainRecipe, tiny, ["optim.warmup_steps=5"]).optim.warmup_steps == 5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stps=3", "override stps=3: unknown key stps; did you mean steps?"),
        ("optim.momentum=3", "unknown key optim.momentum; the keys in [optim] are lr, weight_decay"),
        ("optim.wamup=3", "did you mean optim.warmup_steps?"),
        ("data.clip_grad_norm=3", "did you mean optim.clip_grad_norm?"),
        ("steps=many", 'steps = "many" must be a whole number'),
        ("steps=0", "steps = 0 must be at least 1"),
        ("steps=true", "steps = true must be a whole number"),
        ("steps=2.5", "must be a whole number"),
        ("optim=3", "optim = 3 must be a table of keys"),
        ("optim.lr=nan", "optim.lr = NaN must be"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1 = 1.0 must be less than 1"),
        ("optim.schedule=cosin", "must be 'constant', 'cosine'"),
        ("data.paths=[1]", "data.paths.0 = 1 must be a string"),
        ("run.name=a/b", "must be a folder's name"),
        ("run.name=..", "must be a folder's name"),
        ("model.path=here", "[model]: give exactly one of config (a new model) and path (a stored one)"),
        ("tokenizer.kind=bpe", "[tokenizer]: kind = 'bpe' needs vocab_size"),
        ("data.source=task", "[data]: paths belongs to source = 'files'"),
        ("steps.x=1", "override steps.x=1: steps is a value, not a section"),
        ("nonsense", "expected key.path=value"),
        ("=1", "expected key.path=value"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(tiny: Path, override: str, expected: str) -> None:
    assert expected in message(PretrainRecipe, tiny, override)


def test_a_mistake_in_the_file_names_the_file(tiny: Path) -> None:
    tiny.write_text(PRETRAIN.replace("steps", "stpes"))
    assert message(PretrainRecipe, tiny) == f"{tiny}: unknown key stpes; did you mean steps?"
    tiny.write_text(PRETRAIN.replace("steps = 10\n", ""))
    assert message(PretrainRecipe, tiny) == f"{tiny}: steps is missing (optimiser steps)"


def test_malformed_toml_names_the_line(tiny: Path) -> None:
    tiny.write_text(PRETRAIN + "steps\n")
    assert f"at line {PRETRAIN.count(chr(10)) + 1}" in message(PretrainRecipe, tiny)
    tiny.write_bytes(b"\xff\xfe")
    assert "not a UTF-8 text file" in message(PretrainRecipe, tiny)


def test_a_missing_file_is_answered_with_the_nearest_recipe(tiny: Path) -> None:
    assert message(PretrainRecipe, "tyni.toml") == "no recipe tyni.toml; did you mean tiny.toml?"
    assert message(GrpoRecipe, "quikstart") == "no recipe quikstart; did you mean quickstart?"
    assert "quickstart" in message(GrpoRecipe, "/nowhere/else.toml")


def test_a_recipe_for_another_command_is_recognised() -> None:
    assert "is a recipe for `luciola grpo`" in message(PretrainRecipe, "quickstart")


def test_quickstart_refuses_what_cannot_be_learnt_from() -> None:
    for override, expected in [
        ("rollout.group_size=1", "must be at least 2"),
        ("grpo.group_size=4", "did you mean rollout.group_size?"),
        ("objective.clip_low=1.0", "must be less than 1"),
        ("grpo.updates_per_rollout=3", "must divide rollout.prompts = 32"),
        ("model.path=somewhere", "give exactly one of model.path (a stored model) and [base]"),
        ("task.name=arithmetc", "did you mean 'arithmetic'?"),
    ]:
        assert expected in message(GrpoRecipe, "quickstart", override)
    with pytest.raises(RecipeError, match="all weights are 0"):
        load(GrpoRecipe, "quickstart", ["reward.accuracy=0", "reward.format=0"])


def test_the_base_inherits_seed_task_and_folder() -> None:
    recipe = load(GrpoRecipe, "quickstart", ["seed=5", "run.name=try", "run.folder=elsewhere"])
    base = recipe.base_recipe()
    assert (base.seed, base.task) == (5, recipe.task)
    assert (base.run.folder, base.run.name) == ("elsewhere/try", "base")


@given(
    steps=st.integers(1, 10**12),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,20}", fullmatch=True),
    folder=st.text(min_size=1).filter(lambda text: not text.startswith("~")),
)
def test_any_recipe_comes_back_from_its_toml(steps: int, lr: float, name: str, folder: str) -> None:
    table = tomllib.loads(PRETRAIN) | {"steps": steps, "optim": {"lr": lr}, "run": {"name": name, "folder": folder}}
    recipe = check(PretrainRecipe, table, "here")
    assert check(PretrainRecipe, tomllib.loads(to_toml(recipe)), "there") == recipe


@pytest.mark.parametrize("Model", [PretrainRecipe, SftRecipe, GrpoRecipe, PipelineRecipe, RejectionRecipe])
def test_every_key_is_documented(Model: type[BaseModel]) -> None:
    keys = list(documented_keys(Model))
    assert [key.name for key in keys if not key.description] == []
    assert len({key.name for key in keys}) == len(keys)
