"""The table of a pipeline: what each stage took, and how well its model does on the same held-out problems."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luciola.recipe import check, read_toml
from luciola.recipe.pipeline import STAGES, Stage
from luciola.run import atomic_write

TASK = "heldout"  # the name of the pipeline's task in the evaluation folders

HEADING = ("stage", "what", "steps", "minutes", "held out", "95 % interval", "thinking tokens")


def write(folder: Path, stages: Sequence[Stage]) -> None:
    """Write table.json and table.md: a row a stage, in their order; those that have not finished have no figures.

    Stages that were left out this time and have a folder from an earlier one are among them.
    """
    found = [*stages, *_left_out(folder, {stage.name for stage in stages})]
    rows = [_row(stage) for stage in sorted(found, key=lambda stage: list(STAGES).index(stage.name))]
    atomic_write(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    lines = cells(rows)
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    atomic_write(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in ruled))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of table.json.

    Raises:
        ValueError: there is none, for no stage of the pipeline has finished.
    """
    file = folder / "table.json"
    if not file.exists():
        raise ValueError(f"{folder} has no table yet; it comes with the first finished stage of `luciola r1 RECIPE`")
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, the heading first; after the common columns one for each part of a mixture of tasks."""
    parts = list(dict.fromkeys(part for row in rows for part in row.get("parts", {})))
    lines = [[*HEADING, *parts]]
    for row in rows:
        line = [row["stage"], row["what"], f"{row['steps']:,}"]
        line.append(f"{row['seconds'] / 60:.1f}" if "seconds" in row else "")
        if "accuracy" in row:
            line += [f"{row['accuracy']:.1%}", f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}"]
            line.append(f"{row['thinking_tokens']:.1f}")
        elif "kept" in row:
            line += [f"{row['kept']:,} of {row['candidates']:,} kept", "", ""]
        else:
            line += ["not finished", "", ""]
        lines.append(line + [f"{row['parts'][part]:.1%}" if part in row.get("parts", {}) else "" for part in parts])
    return lines


def _left_out(folder: Path, planned: Collection[str]) -> Iterator[Stage]:
    """The stages in the folder that are not planned, as their own recipes tell."""
    for name, form in STAGES.items():
        file = folder / name / "recipe.toml"
        if name in planned or not file.exists():
            continue
        recipe = check(form.Recipe, read_toml(file) | {"run": {"name": name, "folder": str(folder)}}, str(file))
        start = None
        if form.starts:
            assert recipe.model is not None and recipe.model.path is not None  # these kinds' own check
            made = Path(recipe.model.path).name
            start = made if made in form.starts else form.starts[-1]  # the last is a stored model otherwise
        yield Stage(name, start, recipe)


def _row(stage: Stage) -> dict[str, Any]:
    recipe = stage.recipe
    row: dict[str, Any] = {
        "stage": stage.name,
        "what": STAGES[stage.name].description,
        "starts_from": stage.start,
        "folder": str(stage.folder),
        "steps": recipe.grpo.steps if recipe.kind == "grpo" else recipe.steps,  # type: ignore[union-attr]
    }
    summary, results = stage.folder / "summary.json", stage.folder / "evaluation" / "results.json"
    if summary.exists():
        found = json.loads(summary.read_text())
        row |= {name: found[name] for name in ("seconds", "candidates", "kept", "general", "refused") if name in found}
    if results.exists():
        figures = json.loads(results.read_text())[TASK]
        names = ("problems", "accuracy", "accuracy_low", "accuracy_high", "pass@1", "thinking_tokens", "mean_length")
        row |= {name: figures[name] for name in names if name in figures}
        parts = figures.get("categories", {}).get("part", {})
        row["parts"] = {part: shares["accuracy"] for part, shares in parts.items()}
    return row
