"""The recipe of the R1 pipeline: one TOML file whose stage tables are ordinary recipes, less what the pipeline knows.

Every stage is resolved to the recipe of an ordinary run, kept in runs/NAME/STAGE; `plan` says which model it starts
from and which data it reads (R1 report, section 2.3; DESCRIPTIONS has the paper's words for each).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from luciola.recipe.check import RecipeError, check, nearest
from luciola.recipe.grpo import GrpoRecipe, RolloutSection
from luciola.recipe.schema import (
    Amount,
    Count,
    CountOrZero,
    Dtype,
    ModelSection,
    PretrainRecipe,
    RunSection,
    Section,
    SftRecipe,
    Share,
)
from luciola.tasks import TaskConfig
from luciola.verify.style import Language

SFT_FILE = "sft.jsonl"  # what rejection sampling writes into its run folder


class SelectSection(Section):
    """Which completions become training data: right ones only, and of those the ones worth imitating."""

    per_problem: Count = Field(1, description="different right completions kept of a problem, at most; the first ones")
    well_formed: bool = Field(True, description="only those of the form <think>...</think><answer>...</answer>")
    language: Share = Field(
        0.0, description="least share of the thinking's words in target_language; thinking without words passes"
    )
    target_language: Language = Field("en", description="en: words in Latin letters; zh: Han characters")
    max_tokens: CountOrZero = Field(0, description="longest completion kept, in tokens; 0: any that came to its end")
    max_paragraph: CountOrZero = Field(0, description="longest paragraph of the thinking, in characters; 0: any")
    code_blocks: bool = Field(True, description="false: thinking with ``` is left out, as R1's was")


class GeneralSection(Section):
    """Data other than reasoning, added as it is so that the model does not forget it."""

    rows: Count = Field(description="conversations added")
    task: TaskConfig | None = Field(None, description="a task that writes them, without a fault")
    paths: list[str] = Field([], description="or JSON-lines files of conversations, a list `messages` in each row")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (not self.paths):
            raise ValueError("give exactly one of task (which writes them) and paths (files of conversations)")
        return self


class RejectionRecipe(Section):
    """Rejection sampling: completions of a stored model, of which the right ones become fine-tuning data."""

    kind: ClassVar[str] = "rejection"

    seed: int = Field(0, ge=0, description="seed of the problems and samples")
    steps: Count = Field(description="rounds of rollout.prompts new problems each")
    dtype: Dtype = Field("auto", description="of the arithmetic; auto: the faster here")
    run: RunSection = Field(description="where the run is kept")
    task: TaskConfig = Field(description="the problems and their verifier")
    model: ModelSection = Field(description="the model to sample from (model.path)")
    rollout: RolloutSection = Field(RolloutSection(), description="sampling")
    select: SelectSection = Field(SelectSection(), description="what is kept")
    general: GeneralSection | None = Field(None, description="other data that is added")

    @model_validator(mode="after")
    def _stored_model(self) -> Self:
        if self.model.path is None:
            raise ValueError("this kind of run starts from a stored model: give model.path instead of model.config")
        return self


class HeldOutSection(Section):
    """The evaluation after every stage that makes a model: the same problems for all of them."""

    problems: Count = Field(256, description="held-out problems of the pipeline's task")
    samples: CountOrZero = Field(0, description="completions a problem for pass@k; 0: greedy accuracy only")
    temperature: Amount = Field(0.6, description="sampling temperature")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling")
    max_tokens: Count = Field(256, description="longest completion, in tokens")


StageTable = dict[str, Any] | None


class PipelineRecipe(Section):
    """`luciola r1`: from a base model to a reasoning model and a distilled one, as DeepSeek-R1 was made."""

    kind: ClassVar[str] = "r1"

    seed: int = Field(0, ge=0, description="seed of every stage that has none of its own")
    dtype: Dtype = Field("auto", description="of the arithmetic, in every stage that has none of its own")
    run: RunSection = Field(description="where the pipeline is kept; its stages are runs inside that folder")
    task: TaskConfig = Field(description="all problems: of the evaluations, and of every stage without its own [task]")
    evaluate: HeldOutSection = Field(HeldOutSection(), description="held-out evaluation after every stage")
    model: ModelSection | None = Field(None, description="the base model, when it is a stored one (model.path)")
    student_model: ModelSection | None = Field(None, description="the smaller model, when it is a stored one")
    base: StageTable = Field(None, description="pre-training of the base: keys of `luciola pretrain`")
    cold_start: StageTable = Field(None, description="fine-tuning on a few long solutions: keys of `luciola sft`")
    reasoning_rl: StageTable = Field(None, description="RL on reasoning tasks: keys of `luciola grpo`")
    rejection: StageTable = Field(None, description="sampling of fine-tuning data: keys of RejectionRecipe")
    sft: StageTable = Field(None, description="fine-tuning of the base on that data: keys of `luciola sft`")
    rl_all: StageTable = Field(None, description="RL on all tasks: keys of `luciola grpo`")
    student_base: StageTable = Field(None, description="pre-training of the smaller model: keys of `luciola pretrain`")
    distill: StageTable = Field(None, description="fine-tuning of it on the same data: keys of `luciola sft`")
    student_rl: StageTable = Field(None, description="RL on the smaller model, without it: keys of `luciola grpo`")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        for stage, model in (("base", "model"), ("student_base", "student_model")):
            table, section = getattr(self, stage), getattr(self, model)
            if table is not None and section is not None:
                raise ValueError(f"give one of [{stage}] (pre-train a model) and {model}.path (a stored one), not both")
            if section is not None and section.path is None:
                raise ValueError(f"{model} is a stored model: give {model}.path, or [{stage}] to pre-train one")
        if self.base is None and self.model is None:
            raise ValueError("give model.path (a stored base model) or [base] (pre-train one first)")
        return self


StageRecipe = PretrainRecipe | SftRecipe | GrpoRecipe | RejectionRecipe


class Form(NamedTuple):
    """What a stage is: its kind of run, the stages whose model it starts from (the first that there is), its data."""

    Recipe: type[StageRecipe]
    starts: tuple[str, ...]
    reads_samples: bool
    description: str


STAGES = {
    "base": Form(PretrainRecipe, (), False, "pre-training of the base"),
    "cold_start": Form(SftRecipe, ("base",), False, "cold start: SFT on a few solutions"),
    "reasoning_rl": Form(GrpoRecipe, ("cold_start", "base"), False, "RL on reasoning tasks"),
    "rejection": Form(RejectionRecipe, ("reasoning_rl", "cold_start", "base"), False, "rejection sampling"),
    "sft": Form(SftRecipe, ("base",), True, "SFT of the base on the samples"),
    "rl_all": Form(GrpoRecipe, ("sft", "reasoning_rl", "cold_start", "base"), False, "RL on all tasks"),
    "student_base": Form(PretrainRecipe, (), False, "pre-training of the student"),
    "distill": Form(SftRecipe, ("student_base",), True, "distillation: SFT of the student"),
    "student_rl": Form(GrpoRecipe, ("student_base",), False, "RL run directly on the student"),
}


class Stage(NamedTuple):
    """A stage of a pipeline, resolved: its name, the stage whose model it starts from, and the recipe of its run."""

    name: str
    start: str | None
    recipe: StageRecipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.run.folder, self.recipe.run.name)


def plan(recipe: PipelineRecipe, origin: str, skip: Collection[str] = ()) -> list[Stage]:
    """The stages in their order, without those that are skipped or have no table in the recipe, which is `origin`.

    A stage whose forerunner is skipped starts from the one before that.

    Raises:
        RecipeError: a stage's table has a mistake (the sentence names the stage), or lacks a model or data.
    """
    for name in skip:
        stage_named(name)
    return list(_resolved(recipe, origin, [name for name in STAGES if getattr(recipe, name) and name not in skip]))


def stage_named(name: str) -> str:
    """`name`, if it is a stage; RecipeError otherwise."""
    if name not in STAGES:
        near = nearest(name, STAGES)
        raise RecipeError(
            f"no stage {name}; " + (f"did you mean {near}?" if near else f"there are {', '.join(STAGES)}")
        )
    return name


def _resolved(recipe: PipelineRecipe, origin: str, names: list[str]) -> Iterator[Stage]:
    folder = f"{recipe.run.folder}/{recipe.run.name}"
    models = {name: f"{folder}/{name}" for name in names if name != "rejection"}
    for name, stored in (("base", recipe.model), ("student_base", recipe.student_model)):
        if stored is not None and stored.path is not None:
            models[name] = stored.path
    for name in names:
        form, where = STAGES[name], f"{origin}, stage {name}"
        table = dict(getattr(recipe, name))
        start = next((other for other in form.starts if other in models), None)
        table = _completed(recipe, table, where)
        table["run"] |= {"name": name, "folder": folder}
        if form.starts:
            if "model" in table or "base" in table:
                raise RecipeError(f"{where}: the pipeline gives this stage its model; leave model and base out")
            if start is None:
                raise RecipeError(f"{where}: there is no model to start from, which {form.starts[-1]} would make")
            table["model"] = {"path": models[start]}
        if form.reads_samples and "source" not in (data := table.get("data", {})):
            if "rejection" not in names and "paths" not in data:
                raise RecipeError(
                    f"{where}: it reads what rejection makes; keep that stage, skip this, or set data.paths"
                )
            table["data"] = {"source": "files", "paths": [f"{folder}/rejection/{SFT_FILE}"], **data}
        yield Stage(name, start, check(form.Recipe, table, where))


def _completed(recipe: PipelineRecipe, table: dict[str, Any], where: str) -> dict[str, Any]:
    """The stage's table with what all stages share, where it does not set that itself."""
    shared = recipe.model_dump(mode="json", include={"seed", "dtype", "task", "run"}, exclude_none=True)
    run = table.get("run", {})
    if not isinstance(run, dict) or {"name", "folder"} & run.keys():
        raise RecipeError(f"{where}: the run of a stage is named by the pipeline; leave run.name and run.folder out")
    return {**shared, **table, "run": {**shared["run"], **run}}
