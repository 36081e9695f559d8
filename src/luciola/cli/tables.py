"""Numbers and tables as text, aligned, for terminals and pipes alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def aligned(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows of cells as lines with their columns aligned to the left."""
    rows = [[*row] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def figures(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A table of results as rows of name and value; tables inside it are flattened with dotted names."""
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{inner}", text) for inner, text in figures(value)]
        else:
            rows.append((name, figure(value)))
    return rows


def evaluation(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of `luciola.evaluate` that one looks at first, as rows of name and value."""
    k = result.get("samples", 0)
    rows = [("accuracy", f"{result['accuracy']:.1%}")]
    if "accuracy_low" in result:
        rows.append(("  95 % interval", f"{result['accuracy_low']:.1%} to {result['accuracy_high']:.1%}"))
    names = {
        "pass@1": "pass@1",
        "pass@k": f"pass@{k}",
        "maj@k": f"maj@{k}",
        "format_rate": "well formed",
        "truncated": "truncated",
    }
    for name, label in names.items():
        if name in result:
            rows.append((label, f"{result[name]:.1%}"))
        if name == "pass@1" and "pass@1_low" in result:
            rows.append(("  95 % interval", f"{result['pass@1_low']:.1%} to {result['pass@1_high']:.1%}"))
    if "mean_length" in result:
        rows.append(("mean length", f"{result['mean_length']:.1f} tokens"))
    if "training_tokens" in result:
        rows.append(("training", f"{result['training_tokens']:,} tokens"))
        rows.append(("", f"{result['training_seconds']:.0f} seconds"))
    return rows


def figure(value: Any) -> str:
    """A number with as many digits as one reads: 1,234,567 or 0.977."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def size(number: float) -> str:
    """A number of bytes: "23.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"
