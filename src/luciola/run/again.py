"""Going back to a step that a run has made: for those who want to look at it, not to change it."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luciola.recipe import GrpoRecipe, PretrainRecipe, SftRecipe
from luciola.run.folder import Run
from luciola.run.records import read_records


def last_step(path: Path) -> tuple[int, float | None]:
    """After how many steps to begin, so that the next is one that the run at `path` has made, and the loss it logged.

    It is the last one before which the weights are there: in a checkpoint, or because they are those at the start. Its
    loss is None only where no step is logged yet.
    """
    metrics = path / "metrics.jsonl"
    logged = {m["step"]: m["loss"] for m in read_records(metrics)} if metrics.exists() else {}
    kept = sorted(int(folder.name.removeprefix("step-")) for folder in (path / "checkpoints").glob("step-*"))
    done = max((step for step in (0, *kept) if step + 1 in logged), default=0)
    return done, logged.get(done + 1)


def same_loss(first: float, second: float) -> bool:
    """Whether two losses are equal but for float32 sums taken in another order."""
    return math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-6)


@contextmanager
def standing_at(path: Path, recipe: GrpoRecipe | PretrainRecipe | SftRecipe, done: int) -> Iterator[Run]:
    """A run in a temporary folder that stands where the one at `path`, of this recipe, stood after `done` steps."""
    with tempfile.TemporaryDirectory(prefix="luciola-again-") as folder:
        section = recipe.run.model_copy(update={"folder": folder, "tensorboard": False})
        copy = Path(folder, section.name)
        copy.mkdir()
        for name in ("recipe.toml", "environment.json"):
            shutil.copyfile(path / name, copy / name)
        (copy / "summary.json").write_text("{}")  # it is only looked at: its notes of the machine stay as they are
        if done:
            (copy / "checkpoints").mkdir()
            name = f"step-{done:06}"
            (copy / "checkpoints" / name).symlink_to((path / "checkpoints" / name).resolve())
        if isinstance(recipe, GrpoRecipe) and recipe.base is not None:
            (copy / "base").symlink_to((path / "base").resolve())
        with Run.create(recipe.model_copy(update={"run": section}), recipe.kind, resume=True) as run:
            yield run
