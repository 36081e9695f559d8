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
    from luciola.train.explain import TrainingExplanation

SHOWN = 32  # characters of a completion in the table


def explain(
    subject: Annotated[str, typer.Argument(help="What to explain: loss.")],
    run: Annotated[Path, typer.Argument(help="A run's folder: pre-training, fine-tuning, or any RL objective.")],
    groups: Annotated[int, typer.Option(help="Groups shown completion by completion.", min=0)] = 2,
    rows: Annotated[int, typer.Option(help="Rows shown of a step of pre-training or fine-tuning.", min=0)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, every completion.")] = False,
) -> None:
    """Take the loss of a run apart: its equation, its denominators, and what each completion, or row, adds to it.

    The batch is that of the last step which the run has logged and which can be made again from the weights before it.
    Exit code 1 if the sum is not the trainer's loss.

    \b
    Example: luciola explain loss runs/quickstart --groups 1
    """
    if subject != "loss":
        raise ValueError(f"there is no explanation of {subject!r}; there is one of: loss")
    from luciola.run.compare import run_kind

    kind = run_kind(run)
    if kind == "grpo":
        from luciola.rl.explain import explain_loss

        of_rl = explain_loss(run)
        _print(of_rl, _text(of_rl, groups), as_json)
    elif kind in ("pretrain", "sft"):
        from luciola.train.explain import explain_training

        of_training = explain_training(run, kind)
        _print(of_training, _training_text(of_training, rows), as_json)
    else:
        raise ValueError(
            f"{run} is a stage of `luciola r1` that samples and trains nothing, so that it has no loss; give one that "
            "trains"
        )


def _print(found: Explanation | TrainingExplanation, text: str, as_json: bool) -> None:
    print(json.dumps(asdict(found) | {"agrees": found.agrees}, indent=2) if as_json else text)
    if not found.agrees:
        raise ValueError(
            f"the sum is not the loss: {found.loss} here, {found.trainer_loss} in the trainer, {found.logged_loss} "
            "in the log; was the run made on another machine or version?"
        )


def _training_text(found: TrainingExplanation, shown: int) -> str:
    numbers = ", ".join(f"{name} = {value:,}" for name, value in found.denominators.items())
    read = sum(row.tokens for row in found.rows)
    chosen = sorted(found.rows, key=lambda row: -row.contribution)[:shown]
    columns: dict[str, list[Any]] = {
        "predicted": [_short(row.text, 2 * SHOWN) for row in chosen],
        "documents": [row.documents for row in chosen],
        "tokens": [row.tokens for row in chosen],
        "trained": [row.trained for row in chosen],
        "mean -log p": [row.mean for row in chosen],
        "adds to the loss": [f"{row.contribution:+.3e}" for row in chosen],
    }
    kept = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    cells = [[figure(value) for value in row] for row in zip(*kept.values(), strict=True)]
    total = [
        (f"{len(found.rows)} rows add up to", _signed(found.loss)),
        ("the trainer's own loss", _signed(found.trainer_loss)),
    ]
    if found.logged_loss is not None:
        total.append((f"metrics.jsonl, step {found.step}", _signed(found.logged_loss)))
    if found.mtp_loss is not None:
        total.append(("beside it, mean of L_k", _signed(found.mtp_loss)))
    perplexity = math.exp(min(found.loss, 700.0))
    blocks = [
        f"{found.run}, step {found.step}",
        aligned(found.equation.items(), indent="  "),
        f"{numbers}   ({len(found.rows)} rows, {read:,} tokens read)",
        aligned([list(kept), *cells], indent="  ") if chosen else "",
        aligned(total),
        f"A perplexity of {perplexity:.4g}; all tokens alike would have a loss of {found.uniform:.4f}.",
    ]
    return "\n\n".join(block for block in blocks if block)


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
