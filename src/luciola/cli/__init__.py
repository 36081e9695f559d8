"""The command line. Each command lives in a small function that imports its room when called: `--help` needs no torch.

Exit codes: 0 done, 1 failed, 2 wrong usage or a wrong recipe, 130 stopped with Ctrl-C.
"""

import io
import sys
from typing import Annotated

import typer

from luciola.cli.ask import generate
from luciola.cli.chat import chat
from luciola.cli.court import court
from luciola.cli.errors import guarded
from luciola.cli.explain import explain
from luciola.cli.files import convert, inspect, parity
from luciola.cli.look import bench, compare, doctor, runs
from luciola.cli.measure import evaluate
from luciola.cli.r1 import r1
from luciola.cli.serve import serve
from luciola.cli.train import grpo, pretrain, quickstart, sft

app = typer.Typer(
    name="luciola",
    help="Reasoning language models the DeepSeek way. Start with: luciola quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from luciola import __version__

        print(__version__)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)]


@app.callback()
def _program(version: Version = False) -> None:
    pass


for command in (
    quickstart,
    pretrain,
    sft,
    grpo,
    r1,
    evaluate,
    generate,
    chat,
    serve,
    convert,
    inspect,
    parity,
    runs,
    compare,
    explain,
    court,
    doctor,
    bench,
):
    app.command()(guarded(command))


def main() -> None:
    """The program `luciola`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without these characters is no reason to fail
    app(prog_name="luciola")
