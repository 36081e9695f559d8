"""Recipes: what a run shall do, as a TOML file that is checked before anything starts.

`schema.py`, `grpo.py`, `objective.py` and `pipeline.py` say which keys there are, `check.py` turns a mistake into one
sentence, `files.py` reads and writes.

    recipe = load(GrpoRecipe, "quickstart", ["grpo.steps=20", "run.name=try2"])
"""

from luciola.recipe.check import RecipeError, check, documented_keys
from luciola.recipe.files import assemble, load, read_toml, resolve, shipped, to_toml
from luciola.recipe.grpo import (
    CriticSection,
    EvaluateSection,
    GrpoRecipe,
    GrpoSection,
    RewardSection,
    RolloutSection,
)
from luciola.recipe.objective import ObjectiveSection
from luciola.recipe.pipeline import PipelineRecipe, RejectionRecipe
from luciola.recipe.schema import (
    LoraSection,
    ModelSection,
    OptimSection,
    PretrainDataSection,
    Pretraining,
    PretrainRecipe,
    RunSection,
    SftDataSection,
    SftRecipe,
    TokenizerSection,
)

Recipe = PretrainRecipe | SftRecipe | GrpoRecipe | RejectionRecipe  # those of a single run

__all__ = [
    "CriticSection",
    "EvaluateSection",
    "GrpoRecipe",
    "GrpoSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimSection",
    "PipelineRecipe",
    "PretrainDataSection",
    "PretrainRecipe",
    "Pretraining",
    "Recipe",
    "RecipeError",
    "RejectionRecipe",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "SftDataSection",
    "SftRecipe",
    "TokenizerSection",
    "assemble",
    "check",
    "documented_keys",
    "load",
    "read_toml",
    "resolve",
    "shipped",
    "to_toml",
]
