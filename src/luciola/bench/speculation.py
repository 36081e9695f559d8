"""Speculative decoding with the multi-token prediction head, one sequence: the quickstart's model with and without it.

The model is that of `runs/quickstart` where this folder has it; else the quickstart's base is pre-trained once (about a
minute and a half) and kept in the cache folder. Completions end where the model ends them, so speed is tokens a second
over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luciola.bench.subjects import Prompts, quickstart_base
from luciola.bench.turns import Turn, machine, take_turns

PEERS: tuple[str, ...] = ()
ROUNDS, WARMUP = 60, 3
NEW_TOKENS = 64
QUICKSTART = Path("runs/quickstart")
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "float32"},
    "mtp": {"dtype": "float32", "speculate": "mtp"},
}


def run() -> dict[str, Any]:
    """Tokens a second with and without, their ratio and the share of drafted tokens that were accepted."""
    model = trained_model()
    prompts = _prompts(model, WARMUP + ROUNDS)
    result: dict[str, Any] = {}
    for name, temperature in TEMPERATURES.items():
        shared = {
            "model": str(model),
            "prompts": prompts,
            "new_tokens": NEW_TOKENS,
            "temperature": temperature,
            "ignore_eos": False,
        }
        factory = "luciola.bench.contenders:luciola"
        contenders = {kind: (factory, {"engine": engine, **shared}) for kind, engine in ENGINES.items()}
        turns = take_turns(contenders, ROUNDS, WARMUP)
        result[name] = gain(turns["plain"], turns["mtp"])
    return {**result, "model": str(model), **machine()}


def gain(plain: Sequence[Turn], mtp: Sequence[Turn]) -> dict[str, float]:
    """Tokens a second of both, `ratio`, `acceptance`, and whether a completion came out the same (`same_completions`,
    which greedy decoding must bring to 1)."""
    speeds = [
        sum(len(row) for turn in turns for row in turn.said["tokens"]) / sum(turn.seconds for turn in turns)
        for turns in (plain, mtp)
    ]
    stats = mtp[-1].said["stats"]
    same = sum(a.said["tokens"] == b.said["tokens"] for a, b in zip(plain, mtp, strict=True))
    return {
        "plain_tokens_per_second": speeds[0],
        "mtp_tokens_per_second": speeds[1],
        "ratio": speeds[1] / speeds[0],
        "acceptance": stats["accepted"] / stats["drafted"],
        "same_completions": same / len(plain),
    }


def trained_model() -> Path:
    """The run folder of a model with a trained MTP head; pre-trains one where there is none."""
    if (QUICKSTART / "model").is_dir():
        return QUICKSTART
    return quickstart_base()


def _prompts(model: Path, rounds: int) -> list[Prompts]:
    from luciola.model.language_model import load
    from luciola.tasks.arithmetic import Arithmetic

    tokenizer = load(model).tokenizer
    assert tokenizer is not None  # the quickstart trains one
    task = Arithmetic()
    return [[tokenizer.chat(task.messages(task.problem("heldout", i, 0)))] for i in range(rounds)]
