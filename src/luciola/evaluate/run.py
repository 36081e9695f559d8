"""Held-out evaluation of a model on a task: greedy accuracy, pass@k, maj@k, form, length, cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import derived_seed
from luciola.engine.sequence import Completion
from luciola.evaluate.metrics import maj_at_k, pass_at_k, wilson_interval
from luciola.model.language_model import LanguageModel
from luciola.tasks.base import Problem, Task
from luciola.tasks.judge import judge
from luciola.verify import answer
from luciola.verify.style import format_reward
from luciola.verify.verdict import Verdict

MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Judged:
    """One held-out problem: the greedy completion first, then the samples, each with its verdict."""

    problem: Problem
    completions: list[Completion]
    verdicts: list[Verdict]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of an evaluation, all shares between 0 and 1, and the completions behind them."""

    figures: dict[str, Any]
    judged: list[Judged]


def evaluate(
    lm: LanguageModel,
    task: Task,
    *,
    problems: int = 256,
    samples: int = 8,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    engine: Engine | None = None,
) -> Evaluation:
    """Complete held-out problems once greedily and `samples` times at `temperature`, and judge every completion.

    The same seed gives the same problems and the same samples.

    Args:
        problems: held-out problems, at most as many as a finite task has.
        samples: completions a problem for pass@k and maj@k (k = samples); 0 leaves them out.
        engine: an engine on `lm`, where there is one already.

    Returns:
        figures: `accuracy` (greedy) with its 95 % interval, `pass@1` (mean over samples), `pass@k`, `maj@k`,
        `format_rate`, `truncated`, `mean_length` (all three greedy), `verdicts` (counts over everything), `tokens`,
        `seconds`.

    Raises:
        ValueError: the model has no tokenizer, or the task no held-out problem.
    """
    if lm.tokenizer is None:
        raise ValueError("this model has no tokenizer, so no problem can be put to it")
    began = time.perf_counter()
    engine = engine or Engine(lm)
    chosen = list(_held_out(task, problems, seed))
    prompts = [lm.tokenizer.chat(task.messages(problem)) for problem in chosen]
    greedy = engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    sampled: list[list[Completion]] = [[] for _ in chosen]
    if samples:
        params = [
            SamplingParams(
                max_tokens=max_tokens, temperature=temperature, top_p=top_p, n=samples, seed=derived_seed(seed, i)
            )
            for i in range(len(chosen))
        ]
        sampled = engine.generate(prompts, params)
    completions = [one + many for one, many in zip(greedy, sampled, strict=True)]
    verdicts = judge(task, chosen, [[c.text for c in group] for group in completions])
    judged = [Judged(*row) for row in zip(chosen, completions, verdicts, strict=True)]
    return Evaluation(_figures(judged, samples, time.perf_counter() - began), judged)


def _held_out(task: Task, wanted: int, seed: int) -> Iterator[Problem]:
    """Different held-out problems: a finite split's rows in order, or draws without repetition while there are new
    ones."""
    size = task.size("heldout")
    if size is not None:
        wanted = min(wanted, size)
    seen: set[str] = set()
    for index in range(wanted if size is not None else 20 * wanted):
        problem = task.problem("heldout", index, seed)
        if problem.key not in seen:
            seen.add(problem.key)
            yield problem
        if len(seen) == wanted:
            return


def _figures(judged: list[Judged], samples: int, seconds: float) -> dict[str, Any]:
    count = len(judged)
    if count == 0:
        raise ValueError("the task has no held-out problem to evaluate on; raise its held-out share")
    first = [row.completions[0] for row in judged]
    right = sum(row.verdicts[0].kind == "correct" for row in judged)
    low, high = wilson_interval(right, count)
    kinds = [verdict.kind for row in judged for verdict in row.verdicts]
    figures: dict[str, Any] = {
        "accuracy": right / count,
        "accuracy_low": low,
        "accuracy_high": high,
        "format_rate": sum(format_reward(c.text) for c in first) / count,
        "truncated": sum(c.finish_reason == "length" for c in first) / count,
        "mean_length": sum(len(c.token_ids) for c in first) / count,
        "problems": count,
        "samples": samples,
        "verdicts": {kind: kinds.count(kind) for kind in ("correct", "wrong", "no_answer", "timeout", "crash")},
        "tokens": sum(len(c.token_ids) for row in judged for c in row.completions),
        "seconds": round(seconds, 2),
    }
    if samples:
        correct = [[v.kind == "correct" for v in row.verdicts[1:]] for row in judged]
        answers = [[answer.extract(c.text) for c in row.completions[1:]] for row in judged]
        figures["pass@1"] = sum(pass_at_k(samples, sum(c), 1) for c in correct) / count
        figures["pass@k"] = sum(pass_at_k(samples, sum(c), samples) for c in correct) / count
        figures["maj@k"] = sum(maj_at_k(a, c) for a, c in zip(answers, correct, strict=True)) / count
    return figures
