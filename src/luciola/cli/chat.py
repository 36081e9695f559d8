"""`luciola chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luciola.cli.ask import (
    GROUP,
    Dtype,
    GroupSize,
    MaxTokens,
    MinP,
    Model,
    Quantize,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
    as_options,
    opened,
    run_settings,
)

if TYPE_CHECKING:
    from luciola import Engine, LanguageModel, SamplingParams

THINK, END_THINK = "<think>", "</think>"
MARKUP = (THINK, END_THINK, "<answer>", "</answer>")  # structure, not text to read
DIM, RESET = "\033[2m", "\033[0m"
HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops a reply"


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="A system message; default: the instruction of the task that a run learnt.")
    ] = None,
    history: Annotated[
        bool | None,
        typer.Option(
            "--history/--no-history",
            help="Show the model earlier turns; default: yes, unless it is a run that learnt single questions.",
        ),
    ] = None,
    hide_thinking: Annotated[bool, typer.Option("--hide-thinking", help="Show the answers only.")] = False,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    group_size: GroupSize = GROUP,
    speculate: Speculate = None,
) -> None:
    """Talk to a model; its thinking is shown dim, then its answer.

    Through a pipe, each line is a user's turn.

    \b
    Examples:
      luciola chat runs/quickstart
      printf '12+34 = ?\\n' | luciola chat runs/quickstart --hide-thinking
    """
    from luciola import SamplingParams

    task = run_settings(Path(model)).get("task", {})
    if system is None:
        system = task.get("instruction", "")
    if history is None:
        history = not task
    with as_options():
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
        )
    lm, engine = opened(model, quantize, group_size=group_size, dtype=dtype, speculate=speculate)
    talk = Conversation(lm, engine, params, system, hide_thinking, history)
    if sys.stdin.isatty():
        _talk_to_a_person(talk, model)
    else:
        for line in sys.stdin:
            if line.strip() == "/reset":
                talk.reset()
            elif line.strip():
                talk.reply(line.rstrip("\n"))


class Conversation:
    """The messages so far, and how replies are made and shown."""

    def __init__(
        self,
        lm: LanguageModel,
        engine: Engine,
        params: SamplingParams,
        system: str = "",
        hide_thinking: bool = False,
        history: bool = True,
    ) -> None:
        if lm.tokenizer is None:
            raise ValueError("the model has no tokenizer files, so that no text can be given to it")
        self.tokenizer, self.engine, self.params, self.hide_thinking = lm.tokenizer, engine, params, hide_thinking
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.history = history

    def reset(self) -> None:
        """Forgets everything said, but not the system message."""
        self.messages = []

    def reply(self, text: str) -> None:
        """Prints the reply to a user's turn as it grows. A turn that fails, or is broken off, is forgotten."""
        turn = {"role": "user", "content": text}
        prompt = self.tokenizer.render([*self.system, *self.messages, turn])
        inside = prompt.rstrip().endswith(THINK)  # the template may have opened the thinking for the model
        pieces: list[str] = []

        def collected() -> Iterator[str]:
            for piece in self.engine.stream(self.tokenizer.encode(prompt), self.params):
                pieces.append(piece)
                yield piece

        show(collected(), inside, self.hide_thinking)
        reply = (THINK if inside else "") + "".join(pieces)
        if self.history:
            self.messages += [turn, {"role": "assistant", "content": reply}]


def show(pieces: Iterable[str], inside: bool, hide_thinking: bool) -> None:
    """Prints a reply as it comes: the thinking dim, on a terminal without its markup; in a pipe as it was written."""
    if not sys.stdout.isatty() and not hide_thinking:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    dim, reset = (DIM, RESET) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")
    part: bool | None = None  # what is being shown: None nothing yet, True thinking, False the answer
    gap = ""  # blank space that is shown only if text follows: none stands at the borders of a part
    for thinking, text in split(pieces, inside):
        if thinking and hide_thinking:
            continue
        text = gap + text if thinking == part else text.lstrip()
        gap = text[len(text.rstrip()) :]
        if text := text.rstrip():
            border = "\n\n" if part is not None and thinking != part else ""
            print(f"{border}{dim}{text}{reset}" if thinking else border + text, end="", flush=True)
            part = thinking
    print()


def split(pieces: Iterable[str], inside: bool) -> Iterator[tuple[bool, str]]:
    """(is thinking, text) of a reply that arrives in pieces, without its markup; `inside` if it starts in the thinking.

    A tag may come in several pieces, so text that could begin one is held back until it is known not to.
    """
    held = ""
    for piece in pieces:
        held += piece
        while found := [(held.index(tag), tag) for tag in MARKUP if tag in held]:
            place, tag = min(found)
            if place:
                yield inside, held[:place]
            inside = tag == THINK or (inside and tag != END_THINK)
            held = held[place + len(tag) :]
        starts = (i for i in range(len(held)) if any(tag.startswith(held[i:]) for tag in MARKUP))
        safe = next(starts, len(held))
        if safe:
            yield inside, held[:safe]
            held = held[safe:]
    if held:
        yield inside, held


def _talk_to_a_person(talk: Conversation, model: str) -> None:
    import readline  # noqa: F401  (gives input() line editing and history)

    print(
        f"{model}; {HELP}" if talk.history else f"{model}; each question stands alone (--history changes that); {HELP}"
    )
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            print(HELP)
        elif line:
            try:
                talk.reply(line)
            except KeyboardInterrupt:
                print(RESET if sys.stdout.isatty() else "")
            except ValueError as error:
                print(f"error: {error}  (/reset forgets the conversation)", file=sys.stderr)
