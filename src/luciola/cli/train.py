"""Commands that train: quickstart, pretrain, sft, grpo."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.tables import aligned, evaluation, figure, figures, size

if TYPE_CHECKING:
    from pydantic import BaseModel

Recipe = Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that go before the recipe's: key.path=value ...")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print every setting and what the run would take; start nothing.")
]


def quickstart(overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a small model to reason, from nothing, in a few minutes.

    The same as `luciola grpo recipes/quickstart.toml`: pre-training on flawed worked solutions, then GRPO.

    \b
    Example: luciola quickstart seed=3 run.name=try2
    """
    _train("quickstart", "grpo", "quickstart", overrides, resume, dry_run)


def pretrain(recipe: Recipe, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Pre-train a model on a task's texts or on files.

    \b
    Example: luciola pretrain my.toml optim.lr=1e-3 steps=500
    """
    _train(f"pretrain {shlex.quote(recipe)}", "pretrain", recipe, overrides, resume, dry_run)


def sft(recipe: Recipe, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Fine-tune a stored model on conversations.

    \b
    Example: luciola sft my.toml model.path=runs/base data.paths='["chats.jsonl"]'
    """
    _train(f"sft {shlex.quote(recipe)}", "sft", recipe, overrides, resume, dry_run)


def grpo(recipe: Recipe, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Reinforcement learning from verifiable rewards (GRPO).

    objective.name=NAME with another objective than the recipe's drops the recipe's other keys of [objective].

    \b
    Examples:
      luciola grpo recipes/quickstart.toml optim.lr=2e-4 run.name=try2
      luciola grpo recipes/quickstart.toml objective.name=gspo objective.clip_high=5e-4
    """
    _train(f"grpo {shlex.quote(recipe)}", "grpo", recipe, overrides, resume, dry_run)


def _train(command: str, kind: str, name: str, overrides: list[str] | None, resume: bool, dry_run: bool) -> None:
    from luciola.recipe import GrpoRecipe, PretrainRecipe, SftRecipe, load, to_toml

    kinds: dict[str, type[BaseModel]] = {"pretrain": PretrainRecipe, "sft": SftRecipe, "grpo": GrpoRecipe}
    recipe = load(kinds[kind], name, overrides or ())
    room = import_module("luciola.rl.grpo" if kind == "grpo" else f"luciola.train.{kind}")
    if dry_run:
        # Valid TOML as a whole, so that it can be kept as a recipe.
        print(to_toml(recipe))
        print(aligned(_estimate(room.describe(recipe)), indent="# "))
        if kind == "grpo":
            print("# tokens and time if every completion were rollout.max_tokens long; most end earlier")
        return
    run = Path(recipe.run.folder, recipe.run.name)  # type: ignore[attr-defined]
    if resume and not (run / "recipe.toml").exists():
        others = ", ".join(sorted(path.parent.name for path in run.parent.glob("*/recipe.toml"))) or "none"
        raise ValueError(f"there is no run {run} to resume; in {run.parent} there are: {others}")
    start: Callable[..., Path] = getattr(room, kind)
    try:
        path = start(recipe, resume=resume)
    except KeyboardInterrupt:
        again = " ".join(["luciola", command, *map(shlex.quote, overrides or ()), "--resume"])
        print(f"stopped; continue with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(_report(path))


def _estimate(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    from luciola.run import duration

    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "memory_bytes": ("memory", size),
        "seconds": ("time", duration),
    }
    names = {name: shown.get(name, (name.replace("_", " "), figure)) for name in facts}
    return [(label, text(facts[name])) for name, (label, text) in names.items()]


def _report(path: Path) -> str:
    """The final table of a run, a few completions to compare, and what to do next."""
    summary_file = path / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    before, after = summary.pop("before", None), summary.pop("after", None)
    parts = []
    if before and after:
        old = dict(evaluation(before))
        rows = [(f"{after['problems']} held-out problems", "base", "after RL")]
        parts.append(aligned([*rows, *((name, old.get(name, ""), new) for name, new in evaluation(after))]))
        parts.append(_side_by_side(path / "heldout.jsonl"))
    parts.append(aligned(figures(summary)))
    place = shlex.quote(str(path))
    steps = [
        ("talk to it", f"luciola chat {place}"),
        ("the same in a browser", f"luciola serve {place}"),
        ("its curves", f"{place}/curves.png"),
    ]
    if before and after:
        steps.insert(2, ("measure it", f"luciola evaluate {place}"))
        steps.append(("every held-out answer", f"{place}/heldout.jsonl"))
    steps.append(("the model, in Hugging Face layout", f"{place}/model"))
    parts.append("What next:\n" + aligned(steps, indent="  "))
    return "\n\n".join(part for part in parts if part)


def _side_by_side(held_out: Path, shown: int = 3) -> str:
    """A few held-out problems, completion before beside completion after; first of all those that RL has mended."""
    if not held_out.exists():
        return ""
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (row["before"]["verdict"] == "correct", row["after"]["verdict"] != "correct"))
    blocks = []
    for row in rows[:shown]:
        columns = [
            (f"{label}: {row[name]['verdict'].replace('_', ' ')}", *row[name]["completion"].splitlines())
            for label, name in (("base", "before"), ("after RL", "after"))
        ]
        title = row["prompt"] if len(row["prompt"]) <= 100 else row["prompt"][:97] + "..."
        blocks.append(f"{title}\n" + aligned(zip_longest(*columns, fillvalue=""), indent="  "))
    return "\n\n".join(blocks)
