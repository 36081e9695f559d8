"""`luciola r1`: run the stages of a pipeline, each an ordinary run in runs/NAME/STAGE, and measure what each has made.

runs/NAME/
  pipeline.toml     the recipe            table.json, table.md   the stages side by side, after every stage anew
  STAGE/            its run folder        STAGE/inputs.json      digests of the model and data that it began from
  STAGE/evaluation/ the held-out evaluation of its model (see luciola.evaluate.folder)

A pipeline that was stopped or killed goes on where it was: finished stages say so themselves, the others go on from
their last checkpoint, and all of them end as if nothing had happened, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from luciola.engine.engine import Engine
from luciola.evaluate import folder as evaluation_folder
from luciola.evaluate.run import Evaluation, evaluate
from luciola.model.language_model import load
from luciola.recipe import PipelineRecipe, RecipeError, RejectionRecipe, SftRecipe, to_toml
from luciola.recipe.pipeline import STAGES, Stage, plan, stage_named
from luciola.rl import r1_table as table
from luciola.rl.grpo import grpo
from luciola.rl.rejection import rejection
from luciola.run import atomic_write, progress, refuse_other_settings
from luciola.train.pretrain import pretrain
from luciola.train.sft import sft
from luciola.weights.opening import weight_files

RUNNERS: dict[str, Callable[..., Path]] = {"pretrain": pretrain, "sft": sft, "grpo": grpo, "rejection": rejection}


def r1(
    recipe: PipelineRecipe,
    origin: str,
    *,
    skip: Collection[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> Path:
    """Run the stages from `first` to `last` that are not finished yet; returns the pipeline's folder.

    Args:
        origin: the recipe's name, for error messages.
        skip: stages left out; those after them start from an earlier model.
        first, last: a part of the pipeline; the stages before `first` must have finished.

    Raises:
        RecipeError: a stage's table has a mistake, or there is no such stage.
        ValueError: a stage fails, was begun from another model or data, or one before `first` has not finished.
    """
    stages = plan(recipe, origin, skip)
    chosen = between(stages, first, last)
    folder = Path(recipe.run.folder, recipe.run.name)
    for stage in stages[: stages.index(chosen[0])]:
        if not (stage.folder / "summary.json").exists():
            raise ValueError(f"stage {stage.name} has not finished, so --from {first} has nothing to begin with")
    for stage in chosen:  # all of them before anything is written, so that a refused pipeline stays as it was
        refuse_other_settings(stage.recipe)
        _refuse_other_inputs(stage)
    atomic_write(folder / "pipeline.toml", to_toml(recipe))
    for stage in chosen:
        print(f"{stage.name}: {STAGES[stage.name].description}", file=sys.stderr)
        inputs = _refuse_other_inputs(stage)  # again, now that the stages before it are there
        atomic_write(stage.folder / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        RUNNERS[stage.recipe.kind](stage.recipe, resume=True)
        if not isinstance(stage.recipe, RejectionRecipe):
            measure(stage, recipe)
        table.write(folder, stages)
    return folder


def between(stages: list[Stage], first: str | None, last: str | None) -> list[Stage]:
    """The stages from `first` to `last`, both included; None stands for the first and the last that there is."""
    names = [stage.name for stage in stages]
    for name in (first, last):
        if name is not None and stage_named(name) not in names:
            raise RecipeError(f"stage {name} is not in this pipeline: it is skipped, or the recipe has no [{name}]")
    start = 0 if first is None else names.index(first)
    end = len(names) if last is None else names.index(last) + 1
    if start >= end:
        raise RecipeError(f"--from {first} comes after --until {last}; exchange them" if last else "there is no stage")
    return stages[start:end]


def measure(stage: Stage, recipe: PipelineRecipe) -> None:
    """The held-out evaluation of a stage's model, unless it is there; with other settings it is made anew."""
    folder = stage.folder / "evaluation"
    sampling: dict[str, Any] = {**dict(recipe.evaluate), "seed": recipe.seed}
    settings = json.loads(json.dumps({"task": recipe.task.model_dump(mode="json"), **sampling}))
    if (folder / "settings.json").exists() and json.loads((folder / "settings.json").read_text()) != settings:
        shutil.rmtree(folder)
    if (folder / "results.json").exists():
        return
    evaluation_folder.begin(folder, settings)
    lm = load(stage.folder)
    assert lm.tokenizer is not None  # the stage itself has needed it
    with progress(recipe.evaluate.problems, f"evaluation of {stage.name}", unit="problem") as advance:
        kept = folder / f"{table.TASK}.jsonl"
        engine = Engine(lm, dtype=recipe.dtype)
        found = evaluate(lm, recipe.task, engine=engine, kept=kept, advance=advance, **sampling)
    thinking = [row.greedy.text.partition("</think>") for row in found.judged]
    tokens = sum(len(lm.tokenizer.encode(text.replace("<think>", ""))) for text, ended, _ in thinking if ended)
    figures = {**found.figures, "thinking_tokens": tokens / len(thinking)}
    evaluation_folder.finish(folder, stage.name, {table.TASK: Evaluation(figures, found.judged)})


def _refuse_other_inputs(stage: Stage) -> dict[str, str]:
    """The digests of what a stage starts from, as far as it is there, by file.

    Raises:
        ValueError: the model or the data is another than when this stage began: an earlier stage was made anew, or a
            stored model replaced.
    """
    files: list[Path] = []
    if stage.start is not None:  # the pipeline's own plan has then given it a model
        files += weight_files(stage.recipe.model.path)  # type: ignore[union-attr, arg-type]
    if isinstance(stage.recipe, SftRecipe):
        files += [Path(path) for path in stage.recipe.data.paths if Path(path).is_file()]
    ours = {str(path): _digest(path) for path in files}
    kept = stage.folder / "inputs.json"
    if kept.exists() and any((stage.folder / name).exists() for name in ("before.json", "metrics.jsonl")):
        theirs = json.loads(kept.read_text())
        changed = [path for path in ours if ours[path] != theirs.get(path)]
        if changed:
            raise ValueError(
                f"{stage.folder} was begun from another {changed[0]} than is there now; delete {stage.folder} to make "
                "it anew from this one"
            )
    return ours


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
