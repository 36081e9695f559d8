"""`luciola r1`: the R1 pipeline."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luciola.cli.tables import aligned, figure


def r1(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A TOML file, or a shipped recipe: r1, r1-smollm2, smollm2-countdown, deepseek-r1."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that go before the recipe's: STAGE.key.path=value ...")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave this stage out; may be given several times.")] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Begin with this stage; those before have finished.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", help="End with this stage.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where it stopped, as the same command does without it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and what each stage would take; start nothing.")
    ] = False,
    table: Annotated[Path | None, typer.Option(help="Only print the table of this pipeline's folder.")] = None,
) -> None:
    """The R1 pipeline: cold start, RL, rejection sampling, SFT, RL on all tasks, distillation.

    Each stage is a run of its own. A stage that has finished is not run again, and one that was stopped goes on.

    \b
    Examples:
      luciola r1 recipes/r1.toml
      luciola r1 recipes/r1.toml run.name=zero --skip cold_start --until reasoning_rl
      luciola r1 --table runs/r1
    """
    from luciola.recipe import PipelineRecipe, RecipeError, load, to_toml
    from luciola.recipe.pipeline import plan

    if table is not None:
        print(_table(table))
        return
    if recipe is None:
        raise RecipeError("give a recipe, for example recipes/r1.toml, or --table FOLDER")
    settings = load(PipelineRecipe, recipe, overrides or ())
    stages = plan(settings, recipe, skip or ())
    if dry_run:
        from luciola.rl.r1 import between
        from luciola.rl.r1_estimate import describe

        chosen = between(stages, first, last)
        print(to_toml(settings))  # valid TOML as a whole, so that it can be kept as a recipe
        print(
            _estimates(
                [(stage.name, stage.start, facts) for stage, facts in describe(settings, stages) if stage in chosen]
            )
        )
        return
    from luciola.rl.r1 import r1 as start

    try:
        path = start(settings, recipe, skip=skip or (), first=first, last=last)
    except KeyboardInterrupt:
        print(f"stopped; continue with: luciola {shlex.join(sys.argv[1:])}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(_table(path))
    print(f"\nThe same as JSON and Markdown: {path / 'table.json'}, {path / 'table.md'}")


def _table(folder: Path) -> str:
    from luciola.rl.r1_table import cells, read

    return aligned(cells(read(folder)))


def _estimates(stages: list[tuple[str, str | None, dict[str, Any]]]) -> str:
    """The plan as comments of a TOML file: a line a stage, and a sentence for what is not there."""
    from luciola.run import duration

    rows: list[tuple[str, ...]] = [("stage", "starts from", "parameters", "tokens at most", "time")]
    for name, start, facts in stages:
        time = duration(facts["seconds"]) if "seconds" in facts else "?"
        parameters = figure(facts["parameters"]) if "parameters" in facts else "?"
        rows.append((name, start or "nothing", parameters, figure(facts["tokens"]), time))
    missing = dict.fromkeys(facts["missing"] for *_, facts in stages if "missing" in facts)
    whole = sum(facts.get("seconds", 0.0) for *_, facts in stages)
    notes = [f"# not estimated: {sentence}" for sentence in missing]
    if not missing:
        notes = [f"# all stages: {duration(whole)}, without the evaluations; most completions end before the longest"]
    return "\n".join([aligned(rows, indent="# "), *notes])
