"""Held-out evaluation of a model on a task: greedy accuracy, pass@k, maj@k, form, length, cost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import derived_seed
from luciola.evaluate.figures import Attempt, Judged, figures
from luciola.model.language_model import LanguageModel
from luciola.run import read_records
from luciola.run.records import RecordFile
from luciola.tasks.base import AsksForPrograms, Problem, Task, encoded, stops_of
from luciola.tasks.judge import judge
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import printable
from luciola.verify.verdict import Verdict

MAX_TOKENS = 1024
# Completions in the engine at once, about: enough to keep it busy, few enough to lose little when a process is killed.
AT_ONCE = 1024

Advance = Callable[[str, int], None]


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
    kept: Path | None = None,
    advance: Advance = lambda note, count: None,
) -> Evaluation:
    """Complete held-out problems once greedily and `samples` times at `temperature`, and judge every completion.

    The same seed gives the same problems and the same samples, however many problems are asked together.

    Args:
        problems: held-out problems, at most as many as a finite task has.
        samples: completions a problem for pass@k and maj@k (k = samples); 0 leaves them out.
        engine: an engine on `lm`, where there is one already.
        kept: a file for the judged problems, one a line, written as they come. Those that are in it already, of an
            evaluation that was stopped or killed, are not asked again; they must be of the same model and settings,
            which is for the caller to know.
        advance: told after each few problems how many were right so far, and how many are new.

    Returns:
        figures: `accuracy` (greedy), `pass@1` (the mean over samples), `pass@2`, `pass@4` and so on, `pass@k`, `maj@k`,
        each with its 95 % interval (`accuracy_low`, `accuracy_high`); `format_rate`, `truncated`, `mean_length` (all
        three greedy), `verdicts` (counts over everything), `tokens`, `seconds`; `categories`, where the task has some.
        Programs have neither `maj@k` nor `format_rate`: they do not vote, and are not in the R1 form.

    Raises:
        ValueError: as of `asked`, or `kept` holds other problems.
    """
    chosen = asked(lm, task, problems, seed)
    assert lm.tokenizer is not None  # or they could not have been asked
    engine = engine or Engine(lm)
    together = max(1, AT_ONCE // (samples + 1))
    judged = _read(kept, chosen, samples, together) if kept is not None else []
    if judged:
        advance(_note(judged), len(judged))
    stops = stops_of(task)
    file = None if kept is None else RecordFile(kept)
    for start in range(len(judged), len(chosen), together):
        began = time.perf_counter()
        part = chosen[start : start + together]
        params = [[SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stops)] for _ in part]
        for i, each in enumerate(params if samples else [], start=start):
            each.append(
                SamplingParams(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    n=samples,
                    seed=derived_seed(seed, i),
                    stop=stops,
                )
            )
        attempts = _attempts(engine, lm.tokenizer, task, part, params)
        seconds = (time.perf_counter() - began) / len(part)
        new = [Judged(problem, group, seconds) for problem, group in zip(part, attempts, strict=True)]
        for i, row in enumerate(new, start=start):
            if file is not None:
                file.append(i, _record(row))
        judged += new
        advance(_note(judged), len(new))
    if file is not None:
        file.close()
    return Evaluation(figures(judged, answers=not isinstance(task, AsksForPrograms)), judged)


def asked(lm: LanguageModel, task: Task, problems: int, seed: int) -> list[Problem]:
    """The held-out problems that an evaluation puts to the model.

    Raises:
        ValueError: the model has no tokenizer, the task no held-out problem, or one leaves no room in the model's
            context for an answer.
    """
    if lm.tokenizer is None:
        raise ValueError("this model has no tokenizer, so no problem can be put to it")
    chosen = list(_held_out(task, problems, seed))
    context = lm.config.max_position_embeddings
    lengths = {problem.key: len(encoded(lm.tokenizer, task, problem)) for problem in chosen}
    long = [key for key, length in lengths.items() if length >= context]
    if long:
        raise ValueError(
            f"{task.name}: {len(long)} of {len(chosen)} problems do not fit into the model's context of {context} "
            f"tokens with room for an answer, first of all {printable(long[0], 60)} with {lengths[long[0]]} tokens; "
            "take a model with a longer context, or another task"
        )
    return chosen


def _attempts(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    params: Sequence[Sequence[SamplingParams]],
) -> list[list[Attempt]]:
    """All completions of each problem, in the order of its params, judged."""
    prompts = [encoded(tokenizer, task, problem) for problem in problems]
    asked = [(prompt, one) for prompt, each in zip(prompts, params, strict=True) for one in each]
    found = iter(engine.generate([prompt for prompt, _ in asked], [one for _, one in asked]))
    completions = [[completion for _ in each for completion in next(found)] for each in params]
    verdicts = judge(task, problems, [[c.text for c in group] for group in completions])
    return [
        [Attempt(c.text, len(c.token_ids), c.finish_reason, v) for c, v in zip(group, given, strict=True)]
        for group, given in zip(completions, verdicts, strict=True)
    ]


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


def _note(judged: Sequence[Judged]) -> str:
    right = sum(attempt.verdict.kind == "correct" for row in judged for attempt in row.attempts)
    return f"right {right / sum(len(row.attempts) for row in judged):.1%}"


def _record(row: Judged) -> dict[str, Any]:
    problem = row.problem
    return {
        "problem": _identity(problem),
        "prompt": problem.prompt,
        "truth": problem.truth,
        "categories": dict(problem.categories),
        "seconds": row.seconds,
        "attempts": [asdict(attempt) for attempt in row.attempts],
    }


def _read(kept: Path, chosen: Sequence[Problem], samples: int, together: int) -> list[Judged]:
    """The judged problems in the file, which loses those of a batch that did not come to its end.

    A batch that is asked again is asked whole: float arithmetic may differ in the last bits between batches.
    """
    if not kept.exists():
        return []
    records = read_records(kept)
    whole = len(chosen) if len(records) >= len(chosen) else len(records) // together * together
    RecordFile(kept).truncate(whole - 1)
    judged = []
    for problem, record in zip(chosen, records[:whole], strict=False):
        try:
            identity, seconds = record["problem"], float(record["seconds"])
            attempts = [Attempt(**{**a, "verdict": Verdict(**a["verdict"])}) for a in record["attempts"]]
        except (KeyError, TypeError, ValueError):
            step = record["step"]
            raise ValueError(
                f"{kept}: the record of step {step} is damaged; delete it and all later lines to go on"
            ) from None
        if identity != _identity(problem) or len(attempts) != samples + 1:
            raise ValueError(
                f"{kept} holds other problems, lacks one in between, or has another number of samples; choose another "
                "folder"
            )
        judged.append(Judged(problem, attempts, seconds))
    return judged


def _identity(problem: Problem) -> str:
    """A digest of what is asked and what is right: a file that has changed since has other problems."""
    content = json.dumps([problem.key, problem.prompt, problem.truth])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
