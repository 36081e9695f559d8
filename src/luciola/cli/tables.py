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
    """The figures of `luciola.evaluate` that one looks at first, as rows of name and value, the first two with 95 %
    intervals. No name comes twice: rows of several results are joined by it."""
    names = {
        "accuracy": "accuracy",
        "pass@1": "pass@1",
        "pass@k": f"pass@{result.get('samples', 0)}",
        "maj@k": f"maj@{result.get('samples', 0)}",
        "format_rate": "well formed",
        "truncated": "truncated",
    }
    rows = []
    for name, label in names.items():
        if name in result:
            value = f"{result[name]:.1%}"
            if name in ("accuracy", "pass@1") and f"{name}_low" in result:
                value += f" ({result[f'{name}_low']:.1%} to {result[f'{name}_high']:.1%})"
            rows.append((label, value))
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
