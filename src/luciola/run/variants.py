"""Variants of a run over several seeds: their held-out accuracies as a table and as curves.

Runs that differ in nothing but seed, name and folder are one variant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from luciola.recipe import read_toml
from luciola.run.compare import flat, run_kind
from luciola.run.curves import LEAF, NIGHT, QUIET, held_out
from luciola.run.publish import publish_file
from luciola.run.records import read_records

COLORS = ("#e0a100", LEAF, NIGHT, "#b4532a", "#6a5a9c", "#3f87b5", QUIET)


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs with the same settings; of each the (step, held-out accuracy) of its evaluations, by seed."""

    label: str
    curves: dict[int, list[tuple[int, float]]]
    summaries: list[dict[str, Any]]

    def ends(self) -> list[float]:
        """The last accuracy of each run."""
        return [curve[-1][1] for curve in self.curves.values()]

    def middle(self) -> list[tuple[int, float, float, float]]:
        """(step, mean, lowest, highest) at the steps at which every run was evaluated."""
        by_step = [dict(curve) for curve in self.curves.values()]
        steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
        at = [(step, [accuracies[step] for accuracies in by_step]) for step in steps]
        return [(step, mean(values), min(values), max(values)) for step, values in at]


def variants(paths: Sequence[Path]) -> list[Variant]:
    """The variants among these runs, in the order in which they are first named.

    Raises:
        ValueError: a folder is no run, a run has no held-out accuracy yet, or two of a variant have the same seed.
    """
    settings: dict[Path, dict[str, Any]] = {}
    for path in paths:
        run_kind(path)
        settings[path] = flat(read_toml(path / "recipe.toml"))
    keys = dict.fromkeys(
        key for own in settings.values() for key in own if key != "seed" and not key.startswith("run.")
    )
    differing = [key for key in keys if len({repr(own.get(key)) for own in settings.values()}) > 1]
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path, own in settings.items():
        groups.setdefault(tuple(f"{key}={own.get(key)}" for key in differing), []).append(path)
    return [_variant(_label(key, groups), found, settings) for key, found in groups.items()]


def table(found: Sequence[Variant]) -> list[tuple[str, ...]]:
    """Rows, the first a heading: mean accuracy before and after, deviation (n - 1) and range over seeds, mean time."""
    rows: list[tuple[str, ...]] = [("variant", "seeds", "before", "after", "deviation", "lowest", "highest", "seconds")]
    for variant in found:
        ends = variant.ends()
        starts = [accuracy for curve in variant.curves.values() for step, accuracy in curve if step == 0]
        before = f"{mean(starts):.1%}" if starts else ""
        spread = f"{stdev(ends):.1%}" if len(ends) > 1 else ""
        seconds = [summary["seconds"] for summary in variant.summaries if "seconds" in summary]
        rows.append(
            (
                variant.label, ", ".join(map(str, variant.curves)), before, f"{mean(ends):.1%}", spread,
                f"{min(ends):.1%}", f"{max(ends):.1%}", f"{mean(seconds):.0f}" if seconds else "",
            )
        )  # fmt: skip
    return rows


def draw(found: Sequence[Variant], path: Path) -> None:
    """A picture: of each variant the mean over its seeds, their range, and every run as a faint line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6.4, 4.0), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, variant in enumerate(found):
        color = COLORS[i % len(COLORS)]
        for curve in variant.curves.values():
            axes.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=0.8)
        middle = variant.middle()
        if middle:
            steps, means, low, high = zip(*middle, strict=True)
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
            name = f"{variant.label} ({len(variant.curves)} seeds)" if len(variant.curves) > 1 else variant.label
            axes.plot(steps, means, color=color, linewidth=2, marker="o", markersize=3, label=name)
    axes.set_title("held-out accuracy, greedy (band: lowest to highest seed)", loc="left", fontsize=10, color=NIGHT)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.grid(axis="y", color="#e6eaeb", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    with publish_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _variant(label: str, paths: Sequence[Path], settings: Mapping[Path, Mapping[str, Any]]) -> Variant:
    curves: dict[int, list[tuple[int, float]]] = {}
    summaries = []
    for path in paths:
        summary_file, metrics = path / "summary.json", path / "metrics.jsonl"
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
        curve = held_out(read_records(metrics) if metrics.exists() else [], summary)
        if not curve:
            raise ValueError(
                f"the run {path} has no held-out accuracy yet; let it finish (--resume), or set evaluate.every"
            )
        seed = int(settings[path].get("seed", 0))
        if seed in curves:
            raise ValueError(f"two runs of {label} have the seed {seed}, {path} is the second; name one of them")
        curves[seed] = curve
        summaries.append(summary)
    return Variant(label, dict(sorted(curves.items())), summaries)


def _label(key: tuple[str, ...], groups: Mapping[tuple[str, ...], object]) -> str:
    """The name of the objective where that tells the variants apart, else every setting in which they differ."""
    names = [[part for part in other if part.startswith("objective.name=")] for other in groups]
    if names[0] and len({tuple(name) for name in names}) == len(groups):
        return next(part.partition("=")[2] for part in key if part.startswith("objective.name="))
    return ", ".join(key) or "all runs"
