"""Timing contenders fairly: each lives in a process of its own, as its users run it, and they take turns step by step.

Turns make a ratio hold on a machine whose speed drifts; separate processes keep one's settings (thread pools, memory
allocator) from helping or hurting the other.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from luciola import hardware

Step = Callable[[], Any]


class Turn(NamedTuple):
    """One step of a contender: how long it took, and what it returned."""

    seconds: float
    said: Any


def take_turns(contenders: Mapping[str, tuple[str, dict[str, Any]]], rounds: int, warmup: int) -> dict[str, list[Turn]]:
    """Each contender's steps, `rounds` of them after `warmup` uncounted ones.

    Args:
        contenders: for each name, a factory as "module:function" and its arguments; what it returns is called for a
        step.

    Raises:
        RuntimeError: a contender's process failed; its traceback has been printed.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name, (factory, arguments) in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_contend, args=(factory, arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes[name] = ours
        processes.append(process)
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    try:
        for number in range(warmup + rounds):
            for name, pipe in pipes.items():
                try:
                    pipe.send("step")
                    turn = Turn(*pipe.recv())
                except (EOFError, ConnectionError) as error:
                    raise RuntimeError(f"{name} failed; its traceback stands above") from error
                if number >= warmup:
                    turns[name].append(turn)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return turns


def _contend(factory: str, arguments: dict[str, Any], pipe: Connection) -> None:
    module, _, function = factory.partition(":")
    step: Step = getattr(import_module(module), function)(**arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        began = time.perf_counter()
        said = step()
        pipe.send((time.perf_counter() - began, said))


def compare(turns: Mapping[str, list[Turn]], ours: str, peer: str) -> dict[str, Any]:
    """Medians, and the ratio peer / ours turn by turn: above 1 is faster than the peer."""
    ratios = [b.seconds / a.seconds for a, b in zip(turns[ours], turns[peer], strict=True)]
    return {
        f"{ours}_seconds": median_seconds(turns[ours]),
        f"{peer}_seconds": median_seconds(turns[peer]),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "rounds": len(ratios),
    }


def median_seconds(turns: Sequence[Turn]) -> float:
    """The usual time of a step."""
    return statistics.median(turn.seconds for turn in turns)


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on: processor, threads, versions."""
    from importlib.metadata import version

    from luciola import __version__

    facts = {"cpu": hardware.cpu_name(), "threads": hardware.threads(), "luciola": __version__}
    return facts | {name: version(name) for name in ("torch", *packages)}
