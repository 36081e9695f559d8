"""Looking at runs from outside: which there are, how they stand, and what sets two apart."""

from __future__ import annotations

import fcntl
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luciola.recipe import Recipe, to_toml
from luciola.run.records import read_records


@dataclass(frozen=True, slots=True)
class RunInfo:
    """How a run stands, read from its folder."""

    name: str  # relative to the folder of all runs: "quickstart", "quickstart/base"
    path: Path
    kind: str  # "pretrain", "sft", "grpo", "rejection"
    started: str  # ISO time
    state: str  # "running", "stopped", "finished", or "damaged": a file of it cannot be read
    step: int  # last one logged
    steps: int  # of the recipe
    metrics: dict[str, Any]  # of the last step
    summary: dict[str, Any]
    settings: dict[str, Any]  # the recipe, with dotted keys


def list_runs(folder: str | Path) -> list[RunInfo]:
    """The runs below a folder, oldest first; those that belong to another follow it as NAME/base or NAME/STAGE."""
    folder = Path(folder)
    recipes = [*folder.glob("*/recipe.toml"), *folder.glob("*/*/recipe.toml")]
    return sorted((_info(recipe.parent, folder) for recipe in recipes), key=lambda run: (run.started, run.name))


def run_kind(path: Path) -> str:
    """What kind of run a folder is ("grpo", "pretrain", ...).

    Raises:
        ValueError: the folder is no run.
    """
    if not path.exists():
        raise ValueError(f"there is no folder {path}; give the folder of a run, for example runs/quickstart")
    if not (path / "recipe.toml").is_file() or not (path / "environment.json").is_file():
        raise ValueError(f"{path} is no run (it has no recipe.toml); give the folder of a run, see: luciola runs")
    return str(_json(path / "environment.json").get("kind", "?"))


def differences(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """The keys in which two recipes differ, as (key, before, after); None stands for a key that is not set."""
    return _differences(flat(tomllib.loads(to_toml(before))), flat(tomllib.loads(to_toml(after))))


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def table(runs: list[RunInfo]) -> list[tuple[str, ...]]:
    """Rows, the first a heading, that set runs side by side: the settings in which they differ, then the results."""
    settings = list(
        dict.fromkeys(key for run in runs[1:] for key, _, _ in _differences(runs[0].settings, run.settings))
    )
    results = list(dict.fromkeys(key for run in runs for key in flat(run.summary)))
    rows: list[tuple[str, ...]] = [("", *(run.name for run in runs))]
    rows += [(key, *(_text(run.settings.get(key)) for run in runs)) for key in settings if not key.startswith("run.")]
    rows += [("step", *(f"{run.step}/{run.steps}" for run in runs))]
    rows += [(key, *(_text(flat(run.summary).get(key)) for run in runs)) for key in results]
    return rows


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table with dotted keys."""

    def walk() -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.").items()
            else:
                yield prefix + key, value

    return dict(walk())


def _info(path: Path, folder: Path) -> RunInfo:
    try:
        return _read(path, folder)
    except (ValueError, OSError):  # one run that cannot be read hides none of the others
        return RunInfo(str(path.relative_to(folder)), path, "?", "", "damaged", 0, 0, {}, {}, {})


def _read(path: Path, folder: Path) -> RunInfo:
    settings = tomllib.loads((path / "recipe.toml").read_text(encoding="utf-8"))
    facts, summary = _json(path / "environment.json"), _json(path / "summary.json")
    metrics = read_records(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    last = metrics[-1] if metrics else {}
    return RunInfo(
        name=str(path.relative_to(folder)),
        path=path,
        kind=facts.get("kind", "?"),
        started=facts.get("started", ""),
        state="running" if _is_locked(path) else "finished" if summary else "stopped",
        step=last.get("step", 0),
        steps=settings.get("grpo", settings).get("steps", 0),
        metrics=last,
        summary=summary,
        settings=flat(settings),
    )


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def _is_locked(path: Path) -> bool:
    """Whether a living process writes the run (see `luciola.run.folder`)."""
    try:
        with open(path / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
