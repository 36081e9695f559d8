"""`luciola explain loss`: the loss of a run as an equation, and one real batch put into it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.tables import aligned, figure

if TYPE_CHECKING:
    from luciola.rl.explain import CompletionTerms, Explanation

SHOWN = 32  # characters of a completion in the table


def explain(
    subject: Annotated[str, typer.Argument(help="What to explain: loss.")],
    run: Annotated[Path, typer.Argument(help="A run's folder, of any RL objective.")],
    groups: Annotated[int, typer.Option(help="Groups shown completion by completion.", min=0)] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, every completion.")] = False,
) -> None:
    """Take the loss of a run apart: its equation, its denominators, and what each completion of a batch adds to it.

    The batch is that of a step which the run has logged, drawn again from the checkpoint before it (the first step:
    from the model that the run began with). Exit code 1 if the sum is not the trainer's loss.

    \b
    Example: luciola explain loss runs/quickstart --groups 1
    """
    if subject != "loss":
        raise ValueError(f"there is no explanation of {subject!r}; there is one of: loss")
    from luciola.run.compare import run_kind

    kind = run_kind(run)
    if kind == "rejection":
        raise ValueError(
            f"{run} is a stage of `luciola r1` that samples and trains nothing, so that it has no loss; give a run of "
            "`luciola grpo` or another stage of reinforcement learning"
        )
    if kind != "grpo":
        raise ValueError(
            f"{run} is a run of `luciola {kind}`, whose loss is the mean cross-entropy of its trained tokens; give a "
            "run of `luciola grpo`"
        )
    from luciola.rl.explain import explain_loss

    found = explain_loss(run)
    if as_json:
        print(json.dumps(asdict(found) | {"agrees": found.agrees}, indent=2))
    else:
        print(_text(found, groups))
    if not found.agrees:
        raise ValueError(
            f"the sum is not the loss: {found.loss} here, {found.trainer_loss} in the trainer, mean over the step "
            f"{found.step_loss}, logged {found.logged_loss}; was the run made on another machine or version?"
        )


def _text(found: Explanation, groups: int) -> str:
    of = f", the last of {found.optimizer_steps} optimiser steps" if found.optimizer_steps > 1 else ""
    numbers = ", ".join(f"{name} = {value:,}" for name, value in found.denominators.items())
    counted = sum(row.known and row.tokens > 0 for row in found.completions)
    tokens = sum(row.tokens for row in found.completions)
    blocks = [
        f"{found.run}, step {found.step}{of}: {found.objective}",
        aligned(found.equation.items(), indent="  "),
        f"{numbers}   ({counted} completions whose reward is known, {tokens:,} tokens)",
    ]
    chosen = _groups(found.completions)[:groups]
    for group in chosen:
        blocks.append(_group([row for row in found.completions if row.group == group]))
    rest = [row for row in found.completions if row.group not in chosen]
    total = [(f"{len(found.completions)} completions add up to", _signed(found.loss))]
    if chosen and rest:
        others = math.fsum(row.contribution for row in rest)
        total = [
            ("the completions above", _signed(found.loss - others)),
            (f"the {len(rest)} others", _signed(others)),
            ("sum", _signed(found.loss)),
        ]
    total.append(("the trainer's own loss", _signed(found.trainer_loss)))
    if found.logged_loss is not None:
        name = f"metrics.jsonl, step {found.step}" + (" (mean of the optimiser steps)" if of else "")
        total.append((name, _signed(found.logged_loss)))
    blocks.append(aligned(total))
    blocks.append("\n".join(_remarks(found)))
    return "\n\n".join(block for block in blocks if block)


def _signed(loss: float) -> str:
    """Nine decimals, or where these would hide what there is, three beside a power of ten."""
    return f"{loss:+.9f}" if loss == 0 or abs(loss) >= 1e-6 else f"{loss:+.3e}"


def _groups(rows: list[CompletionTerms]) -> list[int]:
    """Numbers of the groups, those that add most to the loss first."""
    sizes: dict[int, float] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0.0) + abs(row.contribution)
    return sorted(sizes, key=lambda group: -sizes[group])


def _group(rows: list[CompletionTerms]) -> str:
    """A table of the group's completions, without the columns that are empty for all of them."""
    first = rows[0]
    title = f"{_short(first.prompt, 80)}"
    if first.replayed:
        title += "   (replayed from an earlier step)"
    elif first.mean is not None:
        deviation = "" if first.deviation is None else f", deviation {first.deviation:.4f}"
        of = "rewards" if first.steps is None else "rewards of steps"
        title += f"   {of}: mean {first.mean:.4f}{deviation}"
    columns: dict[str, list[Any]] = {"completion": [_short(row.completion, SHOWN) for row in rows]}
    columns["verdict"] = [row.verdict for row in rows]
    columns["steps"] = [None if row.steps is None else " ".join(map(figure, row.steps)) for row in rows]
    for name in first.rewards or ():
        columns[name] = [None if row.rewards is None else row.rewards[name] for row in rows]
    for name in ("reward", "advantage", "tokens", "weight", "ratio", "clipped", "kl", "masked", "importance"):
        columns[name] = [getattr(row, name) for row in rows]
    columns["adds to the loss"] = [f"{row.contribution:+.3e}" for row in rows]
    kept = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    cells = [[figure(value) for value in row] for row in zip(*kept.values(), strict=True)]
    return title + "\n" + aligned([list(kept), *cells], indent="  ")


def _remarks(found: Explanation) -> list[str]:
    """What such numbers make people ask."""
    ratios = [row.ratio for row in found.completions if row.ratio is not None]
    remarks = []
    if ratios and "rho" in found.equation.get("ratio", "") and all(abs(ratio - 1) < 1e-4 for ratio in ratios):
        who = "these weights have sampled the batch"
        if any(row.replayed for row in found.completions):
            capped = "importance" in found.equation
            older = "pi_old of the replayed ones is theirs too" if capped else "hardly moved since the replayed ones"
            who = f"these weights have sampled the new groups and {older}"
        remarks.append(
            f"Every ratio is 1, since {who}: the loss is then minus a weighted mean of the advantages,\n"
            "near 0 however much is learnt. The gradient is not; rewards tell whether it helps."
        )
    if found.groups_without_spread:
        share = f"{found.groups_without_spread:.0%}"
        remarks.append(f"In {share} of the groups {found.lacking}: there is nothing to learn from.")
    if any(row.ratio is None for row in found.completions if row.tokens) and found.objective != "dpo":
        remarks.append("Completions without a ratio have no advantage: the update leaves them out.")
    return remarks


def _short(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."
