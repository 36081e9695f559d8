"""The picture of a run: how loss, reward, accuracy and length went, one panel each for what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

NIGHT, GLOW, LEAF, QUIET = "#14323b", "#e0a100", "#2c7a6b", "#8a979b"
SMOOTHING = 15  # neighbouring steps that make up the bold line over the faint measurements


@dataclass(slots=True)
class Panel:
    """One diagram: a series by step, its spread, and a few measured points."""

    title: str
    steps: list[int]
    values: list[float]
    color: str
    spread: list[float] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)
    percent: bool = False


def draw(
    records: Records, path: Path, title: str, base: Records = (), summary: Mapping[str, Any] | None = None
) -> None:
    """Draws curves.png; without anything to draw, no file is made.

    `base` are the records of the pre-training that went before; `summary` is the final table, for the accuracy before
    and after.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(records, base, summary or {})
    if not shown:
        return
    figure = Figure(figsize=(3.6 * len(shown) + 0.4, 3.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _draw_panel(axes, panel)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=NIGHT)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def panels(records: Records, base: Records, summary: Mapping[str, Any]) -> list[Panel]:
    """What there is to show, in the order of the story: loss, reward, accuracy, length."""
    shown = []
    for title, source in (("pre-training loss", base), ("loss", records)):
        # The loss of GRPO hovers around zero whatever is learnt: rewards tell its story.
        if source and not any("reward/mean" in record for record in source):
            shown.append(_series(title, source, "loss", NIGHT))
    reward = _series("reward", records, "reward/mean", LEAF)
    reward.spread = [float(r.get("reward/std") or 0) for r in records if r.get("reward/mean") is not None]
    shown.append(reward)
    shown.append(_accuracy(records, summary))
    shown.append(_series("completion length (tokens)", records, "completion/length", QUIET))
    return [panel for panel in shown if len(panel.steps) > 1 or panel.points]


def _series(title: str, records: Records, key: str, color: str) -> Panel:
    known = [(record["step"], float(record[key])) for record in records if record.get(key) is not None]
    return Panel(title, [step for step, _ in known], [value for _, value in known], color)


def _accuracy(records: Records, summary: Mapping[str, Any]) -> Panel:
    """The share of right completions in rollouts, and as points the held-out evaluations."""
    panel = Panel("accuracy (line: rollouts, dots: held out, greedy)", [], [], GLOW, percent=True)
    for record in records:
        verdicts = {key: float(value or 0) for key, value in record.items() if key.startswith("verdict/")}
        if sum(verdicts.values()) > 0:
            panel.steps.append(record["step"])
            panel.values.append(verdicts.get("verdict/correct", 0.0) / sum(verdicts.values()))
    panel.points = held_out(records, summary)
    return panel


def held_out(records: Records, summary: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, greedy accuracy on held-out problems) of every evaluation of a run, that before it as step 0."""
    points = [
        (record["step"], float(record["evaluate/accuracy"]))
        for record in records
        if record.get("evaluate/accuracy") is not None
    ]
    ends = (("before", 0), ("after", max((record["step"] for record in records), default=0)))
    for name, step in ends:
        values = summary.get(name)
        accuracy = values.get("accuracy") if isinstance(values, Mapping) else summary.get(f"{name}.accuracy")
        if accuracy is not None:
            points.append((step, float(accuracy)))
    return sorted(points)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_title(panel.title, loc="left", fontsize=10, color=NIGHT)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color="#e6eaeb", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9d1d3")
    if panel.percent:
        axes.set_ylim(-0.02, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    if panel.steps:
        smooth = smoothed(panel.values, SMOOTHING)
        if panel.spread:
            low = [value - spread for value, spread in zip(smooth, panel.spread, strict=True)]
            high = [value + spread for value, spread in zip(smooth, panel.spread, strict=True)]
            axes.fill_between(panel.steps, low, high, color=panel.color, alpha=0.12, linewidth=0)
        axes.plot(panel.steps, panel.values, color=panel.color, alpha=0.3, linewidth=0.8)
        axes.plot(panel.steps, smooth, color=panel.color, linewidth=2, solid_capstyle="round")
    for step, value in panel.points:
        axes.plot([step], [value], "o", color=NIGHT, markersize=5, clip_on=False, zorder=3)
        leftmost = step == panel.points[0][0]
        label = f"{value:.0%}" if panel.percent else f"{value:.3g}"
        axes.annotate(
            label,
            (step, value),
            xytext=(7, -3) if leftmost else (-7, 5),
            textcoords="offset points",
            ha="left" if leftmost else "right",
            fontsize=8,
            color=NIGHT,
        )


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Each value replaced by that of the straight line which fits it and its neighbours best.

    Half a window on either side, which is their mean, or as many as there are: then a trend goes on to the end, and a
    last value that stands out does not.
    """
    import numpy as np

    half = min(window, len(values) // 5) // 2
    if half == 0:
        return list(values)
    smooth = []
    for i in range(len(values)):
        start = max(0, i - half)
        near = values[start : i + half + 1]
        smooth.append(float(np.polynomial.Polynomial.fit(range(start, start + len(near)), near, 1)(i)))
    return smooth
