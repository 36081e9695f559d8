"""Servers, ours and llama.cpp's, on one Q4_1 file of SmolLM2-135M: tokens a second and seconds to the first token.

1, 8 and 32 clients stream completions of random tokens at /v1/completions, each the next as soon as it has its last.
Every completion has the same length, so that both do the same work. All servers stand ready all the time, each a
process of its own, and take turns; so are the clients.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from luciola import hardware
from luciola.bench.client import events, post, served
from luciola.bench.subjects import SMOLLM2_VOCABULARY, Prompts, random_prompts, smollm2_file
from luciola.bench.turns import Step, Turn, compare, machine, median_seconds, take_turns

PEERS = ("llama.cpp",)
# "keep" computes with the file's own 4-bit numbers; the others with what is made of them.
OURS = {name: ("--quantize", name) for name in ("int8", "int4", "keep")}
CLIENTS = {1: 4, 8: 2, 32: 2}  # how many at once: completions that each asks for in a turn
ROUNDS, WARMUP = 3, 1
PROMPT, NEW_TOKENS = 32, 64


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """For each number of clients: tokens a second of every server, the ratio of our best one to the peer with its
    spread, and the median and the 99th of a hundred times to the first token."""
    from luciola.weights.witness import LlamaCpp

    most = max(CLIENTS)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        file = smollm2_file(Path(folder), "q4_1")
        urls = {}
        for name, options in OURS.items():
            log = Path(folder) / f"{name}.log"
            urls[name] = stack.enter_context(served(str(file), log, "--no-access-log", *options))[0]
        context = PROMPT + NEW_TOKENS + 8
        theirs = LlamaCpp(file, context, hardware.threads(), slots=most, exact=False)
        urls[against] = stack.enter_context(theirs).address
        for clients, each in CLIENTS.items():
            prompts = random_prompts(SMOLLM2_VOCABULARY, clients * each, PROMPT, WARMUP + ROUNDS)
            shared = {"prompts": prompts, "clients": clients, "new_tokens": NEW_TOKENS}
            contenders = {name: (f"{__name__}:asking", {"url": url, **shared}) for name, url in urls.items()}
            turns = take_turns(contenders, ROUNDS, WARMUP)
            result[f"clients_{clients}"] = standings(turns, list(OURS), against)
    return {**result, "prompt": PROMPT, "new_tokens": NEW_TOKENS, **machine("xllamacpp")}


def standings(turns: Mapping[str, Sequence[Turn]], ours: Sequence[str], peer: str) -> dict[str, Any]:
    """The figures of one number of clients.

    Raises:
        RuntimeError: two servers have not written as many tokens in their turns.
    """
    counts = {name: sum(turn.said["tokens"] for turn in taken) for name, taken in turns.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"the servers have written different numbers of tokens: {counts}")
    tokens = turns[peer][0].said["tokens"]
    best = min(ours, key=lambda name: median_seconds(turns[name]))
    compared = compare({name: list(taken) for name, taken in turns.items()}, best, peer)
    first = {
        name: sorted(itertools.chain.from_iterable(turn.said["first"] for turn in taken))
        for name, taken in turns.items()
    }
    return {
        "best": best,
        **{name: value for name, value in compared.items() if not name.endswith("_seconds")},
        "tokens_per_second": {name: tokens / median_seconds(taken) for name, taken in turns.items()},
        "first_token_p50": {name: times[len(times) // 2] for name, times in first.items()},
        "first_token_p99": {name: times[int(0.99 * len(times))] for name, times in first.items()},
    }


def asking(url: str, prompts: list[Prompts], clients: int, new_tokens: int) -> Step:
    """Clients of a server; a step has them ask for the completions of the next round's prompts, and returns the
    `tokens` that the server has counted, and the seconds to the `first` of each completion."""
    rounds = itertools.cycle(prompts)
    return lambda: asyncio.run(_round(url, next(rounds), clients, new_tokens))


async def _round(url: str, prompts: Prompts, clients: int, new_tokens: int) -> dict[str, Any]:
    left, first, counted = list(prompts), [], []

    async def client() -> None:
        while left:
            seconds, tokens = await _complete(url, left.pop(), new_tokens)
            first.append(seconds)
            counted.append(tokens)

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"tokens": sum(counted), "first": first}


async def _complete(url: str, prompt: list[int], new_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and how many came by the server's own count."""
    body = {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, last = time.perf_counter(), 0.0, b""
    async with post(f"{url}/v1/completions", body) as (status, pieces):
        if status != 200:
            said = b"".join([piece async for piece in pieces])
            raise RuntimeError(f"{url} answers with status {status}: {said[:500].decode(errors='replace')}")
        async for event in events(pieces):
            first = first or time.perf_counter() - began
            last = event
    return first, json.loads(last)["usage"]["completion_tokens"]
