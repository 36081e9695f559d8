"""Whoever generates in a comparison, as factories for `take_turns`; a step completes the next round's prompts greedily.

A step returns {"tokens": the new tokens of each row} and what else the contender knows: llama.cpp's server its own
clock (`decoded_per_second`, `prefilled_per_second`), our engine its `stats`, and the bytes of weights that each token
makes it read.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luciola import hardware
from luciola.bench.subjects import Prompts
from luciola.bench.turns import Step, Turn, compare, median_seconds, take_turns

LLAMA_CPP = ("llama.cpp", "llama-cpp-python")
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}


def precisions() -> list[str]:
    """Those worth a try here: not bfloat16 where its products are slower than float32's, for int8 reads less still."""
    speeds = hardware.measured()["core_gflops"]
    hopeless = speeds["bfloat16"] < speeds["float32"]
    return [name for name in PRECISIONS if name != "bfloat16" or not hopeless]


def race(
    model: str | Path,
    precisions: Sequence[str],
    peer: str,
    files: Mapping[str, str | Path],
    prompts: list[Prompts],
    new_tokens: int,
    warmup: int = 2,
) -> dict[str, Any]:
    """Ours in each of `precisions` against one peer with each of `files`, by kind, all by turns.

    Returns:
        `tokens_per_second` of every contender (new ones, or with a single new token those of the prompts), `ratio` of
        our `best` precision to the peer's best file with its spread, and to each where there are several (`ratios`),
        `same_tokens` (the share of new tokens in which our first precision agrees with the peer's first; a difference
        ends the agreement of its row), `weight_bytes`, and the peer's own clock where it has one.
    """
    shared: dict[str, Any] = {"prompts": prompts, "new_tokens": new_tokens}
    contenders: dict[str, tuple[str, dict[str, Any]]] = {
        name: (f"{__name__}:luciola", {"model": str(model), "engine": PRECISIONS[name], **shared})
        for name in precisions
    }
    factory = f"{__name__}:{peer.replace('.', '_').replace('-', '_')}"
    theirs = {f"{peer} {kind}": file for kind, file in files.items()}
    contenders |= {name: (factory, {"model": str(file), **shared}) for name, file in theirs.items()}
    turns = take_turns(contenders, len(prompts) - warmup, warmup)
    return standings(turns, precisions, list(theirs), prompts, new_tokens)


def standings(
    turns: Mapping[str, list[Turn]],
    precisions: Sequence[str],
    peers: Sequence[str],
    prompts: list[Prompts],
    new_tokens: int,
) -> dict[str, Any]:
    """The figures of a `race` from its turns."""
    rows = prompts[0]
    tokens = len(rows) * new_tokens if new_tokens > 1 else sum(map(len, rows))
    best, peer = (min(names, key=lambda name: median_seconds(turns[name])) for names in (precisions, peers))
    result: dict[str, Any] = {
        "tokens_per_second": {name: tokens / median_seconds(taken) for name, taken in turns.items()},
        "best": best,
        "peer": peer,
    }
    result |= {name: value for name, value in compare(turns, best, peer).items() if not name.endswith("_seconds")}
    if len(peers) > 1:
        result["ratios"] = {name: compare(turns, best, name)["ratio"] for name in peers}
    ours, theirs = ([turn.said["tokens"] for turn in turns[name]] for name in (precisions[0], peers[0]))
    agreeing = sum(itertools.starmap(_agreement, itertools.chain.from_iterable(map(zip, ours, theirs))))
    result["same_tokens"] = agreeing / sum(len(row) for said in theirs for row in said)
    result["weight_bytes"] = {name: turns[name][0].said["weight_bytes"] for name in precisions}
    if clocks := [turn.said["clock"] for turn in turns[peer] if "clock" in turn.said]:
        result["peer_own_clock"] = {name: statistics.median(clock[name] for clock in clocks) for name in clocks[0]}
    return result


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))


def luciola(
    model: str,
    prompts: list[Prompts],
    new_tokens: int,
    engine: Mapping[str, Any],
    temperature: float = 0.0,
    ignore_eos: bool = True,
) -> Step:
    """Our engine, made with the arguments `engine`."""
    from luciola.engine.engine import Engine
    from luciola.engine.params import SamplingParams
    from luciola.model.language_model import load

    hardware.keep_freed_memory()
    runner = Engine(load(model), **engine)
    params = SamplingParams(max_tokens=new_tokens, temperature=temperature, ignore_eos=ignore_eos, seed=0)
    read = weight_bytes(runner.model)

    def generate(rows: Prompts) -> dict[str, Any]:
        completions = runner.generate(rows, params)
        stats = dict(getattr(runner, "stats", {}))
        return {"tokens": [group[0].token_ids for group in completions], "weight_bytes": read, "stats": stats}

    return _next_round(prompts, generate)


def transformers(model: str, prompts: list[Prompts], new_tokens: int) -> Step:
    """transformers' own class and `generate`, float32."""
    peer: Any = import_module("transformers")
    theirs = peer.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # the weights are random: nothing is to end a row early

    def generate(rows: Prompts) -> dict[str, Any]:
        ids = torch.tensor(rows)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        return {"tokens": out[:, ids.shape[1] :].tolist()}

    return _next_round(prompts, generate)


def llama_cpp(model: str, prompts: list[Prompts], new_tokens: int) -> Step:
    """llama.cpp's server with a slot a row, all requests of a round at once; as its users run it, on all cores."""
    from luciola.weights.witness import LlamaCpp

    rows = len(prompts[0])
    context = max(len(prompt) for prompt in prompts[0]) + new_tokens + 8
    server = LlamaCpp(Path(model), context, hardware.threads(), slots=rows, exact=False)
    pool = ThreadPoolExecutor(rows)

    def generate(rows: Prompts) -> dict[str, Any]:
        replies = list(pool.map(lambda prompt: server.complete(prompt, new_tokens), rows))
        said: dict[str, Any] = {"tokens": [reply["tokens"] for reply in replies]}
        if len(replies) == 1:
            timings = replies[0]["timings"]
            said["clock"] = {
                "decoded_per_second": timings["predicted_per_second"],
                "prefilled_per_second": timings["prompt_per_second"],
            }
        return said

    return _next_round(prompts, generate)


def llama_cpp_python(model: str, prompts: list[Prompts], new_tokens: int) -> Step:
    """llama.cpp as llama-cpp-python has compiled it for this machine, one row, without a server."""
    from llama_cpp import Llama

    if len(prompts[0]) != 1:
        raise ValueError(f"llama-cpp-python completes one sequence at a time, not {len(prompts[0])}")
    context = len(prompts[0][0]) + new_tokens + 8
    threads = hardware.threads()
    theirs = Llama(model, n_ctx=context, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False)

    def generate(rows: Prompts) -> dict[str, Any]:
        theirs.reset()
        stream: Iterator[int] = theirs.generate(rows[0], temp=0.0, repeat_penalty=1.0, reset=True)
        return {"tokens": [list(itertools.islice(stream, new_tokens))]}

    return _next_round(prompts, generate)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a dense model reads for each token: all but an embedding of its own.

    Shared storage counts once; a quantised model's scales count as well.
    """
    embedding = [tensor for name, tensor in model.state_dict().items() if name.startswith("embed_tokens.")]
    rest = [tensor for name, tensor in model.state_dict().items() if not name.startswith("embed_tokens.")]
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and not _has_own_head(model, embedding):
        rest += embedding
    storages: dict[int, int] = {}
    for tensor in rest:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _has_own_head(model: nn.Module, embedding: Sequence[Tensor]) -> bool:
    """Whether the head has weights besides the embedding's, as a quantised one has."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in embedding}
    head = [tensor for name, tensor in model.state_dict().items() if name.startswith("lm_head.")]
    return any(tensor.untyped_storage().data_ptr() not in shared for tensor in head)


def _next_round(prompts: list[Prompts], generate: Callable[[Prompts], dict[str, Any]]) -> Step:
    rounds = itertools.cycle(prompts)
    return lambda: generate(next(rounds))
