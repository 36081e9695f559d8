"""What a person sees when something goes wrong: one sentence on standard error, and an exit code."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option --debug, without which its exceptions end the program with one sentence."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)

    @functools.wraps(command)
    def run(*arguments: Any, debug: bool = False, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (KeyboardInterrupt, Exception) as error:
            # typer.Exit is how a command ends early by itself; wrong usage and a closed pipe are typer's to handle.
            if debug or isinstance(error, typer.Exit | typer.BadParameter | BrokenPipeError):
                raise
            sentence, code = explain(error)
            print(sentence, file=sys.stderr)
            raise typer.Exit(code) from None

    parameters = [*signature.parameters.values(), option]
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def explain(error: BaseException) -> tuple[str, int]:
    """One sentence about an exception, and the exit code that goes with it."""
    from luciola.recipe import RecipeError

    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    return f"error: {_sentence(error)}", 2 if isinstance(error, RecipeError) else 1


def _sentence(error: BaseException) -> str:
    message = " ".join(str(error).split())
    # safetensors reports a full disk with an exception class of its own, numpy with a sentence of its own.
    full = os.strerror(errno.ENOSPC) in message or "Not enough free space" in message
    if full or (isinstance(error, OSError) and error.errno in FULL):
        where = f" for {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"there is no space left on the disk{where}; make room and start again (a run continues with --resume)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in message):
        return f"there is not enough memory ({message}); lower the batch, the group or grpo.micro_batch_tokens"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed; pip install 'luciola[bench]' brings the optional ones"
    if isinstance(error, ValueError | OSError):
        return message
    return f"{type(error).__name__}: {message} (this should not happen; --debug shows where it did)"
