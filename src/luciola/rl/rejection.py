"""Rejection sampling: a model's own right answers become fine-tuning data (R1 report, section 2.3.3).

A step puts `rollout.prompts` new problems to the model, `rollout.group_size` times each, and has the completions
judged. When all are there, `select` decides which are kept; a run folder then holds, beside the usual files,

    candidates.jsonl   every completion with its verdict      sft.jsonl   the conversations kept, and the general data
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from luciola.data.documents import read_records as read_rows
from luciola.engine.engine import Engine
from luciola.engine.sampler import derived_seed
from luciola.model.language_model import LanguageModel, load
from luciola.recipe import RejectionRecipe
from luciola.recipe.pipeline import SFT_FILE, GeneralSection, SelectSection
from luciola.rl.reward import refuse_failures
from luciola.rl.rollout import sampling
from luciola.run import Run, atomic_write, read_records
from luciola.run.records import RecordFile
from luciola.tasks.base import encoded
from luciola.tasks.judge import by_task
from luciola.text.tokenizer import Tokenizer
from luciola.train.stopping import stop_on_signal
from luciola.verify.style import format_reward, language_share

Row = dict[str, Any]


class Selected(NamedTuple):
    """The candidates kept, in their order, and how many were refused for which reason."""

    kept: list[Row]
    refused: Counter[str]


def rejection(recipe: RejectionRecipe, resume: bool = False) -> Path:
    """Run the recipe; returns the run folder, whose `sft.jsonl` holds the data and `summary.json` the counts.

    Raises:
        ValueError: no completion is worth keeping, or the verifiers fail on more than 5 % of a step's.
    """
    with Run.create(recipe, "rejection", resume) as run:
        if run.finished:
            return run.path
        assert recipe.model.path is not None  # the recipe's own check
        lm = load(recipe.model.path)
        if lm.tokenizer is None:
            raise ValueError(f"the model {recipe.model.path} has no tokenizer to write prompts with")
        general = list(_general(recipe.general, recipe.seed))  # what is wrong with it is said before the sampling
        lm.model.to(getattr(torch, run.dtype))
        _sample(lm, lm.tokenizer, recipe, run)
        candidates = read_records(run.path / "candidates.jsonl")
        selected = select(candidates, recipe.select)
        if not selected.kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selected.refused.most_common())
            raise ValueError(
                f"{run.path}: none of {len(candidates)} completions is worth keeping ({reasons}); delete {run.path}, "
                "then sample more (a higher rejection.steps), keep more (a looser rejection.select) or start from a "
                "model that can do the task"
            )
        rows = [{"messages": row["messages"]} for row in selected.kept] + general
        random.Random(f"{recipe.seed}/rejection").shuffle(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(run.path / SFT_FILE, lines.encode(errors="backslashreplace"))
        logged = run.metrics()
        run.summary(
            {
                "candidates": len(candidates),
                "kept": len(selected.kept),
                "general": len(general),
                "refused": dict(sorted(selected.refused.items())),
                "tokens": sum(step["tokens"] for step in logged),
                "seconds": round(sum(step["seconds"] for step in logged), 1),
            }
        )
    return run.path


def select(candidates: Sequence[Row], section: SelectSection) -> Selected:
    """Which candidates are kept: a pure function of them, in their order.

    A candidate has `key` (of its problem), `completion`, `verdict`, `tokens` and `finish_reason`. The reasons to refuse
    one, of which the first is counted: its verdict, if that is not "correct"; truncated; malformed; language; long;
    paragraph; code; duplicate (of a completion of the same problem, blank space apart); enough (of the problem).
    """
    kept: list[Row] = []
    refused: Counter[str] = Counter()
    of_problem: dict[str, set[str]] = {}
    for candidate in candidates:
        texts = of_problem.setdefault(candidate["key"], set())
        text = " ".join(candidate["completion"].split())
        reason = _fault(candidate, section)
        if reason is None and text in texts:
            reason = "duplicate"
        if reason is None and len(texts) == section.per_problem:
            reason = "enough"
        if reason is not None:
            refused[reason] += 1
            continue
        texts.add(text)
        kept.append(candidate)
    return Selected(kept, refused)


def _fault(candidate: Row, section: SelectSection) -> str | None:
    """Why a candidate is not worth imitating, whatever the others are; None if it is."""
    if candidate["verdict"] != "correct":
        return str(candidate["verdict"])
    if candidate["finish_reason"] != "stop":
        return "truncated"
    completion: str = candidate["completion"]
    thinking = completion.partition("</think>")[0].replace("<think>", "")
    share = language_share(completion, section.target_language)
    faults = {
        "malformed": section.well_formed and format_reward(completion) < 1,
        "language": share is not None and share < section.language,
        "long": 0 < section.max_tokens < candidate["tokens"],
        "paragraph": 0 < section.max_paragraph < max(len(part) for part in thinking.split("\n\n")),
        "code": not section.code_blocks and "```" in thinking,
    }
    return next((name for name, found in faults.items() if found), None)


def _sample(lm: LanguageModel, tokenizer: Tokenizer, recipe: RejectionRecipe, run: Run) -> None:
    """Write candidates.jsonl, from the last whole step on if some are there."""
    file = RecordFile(run.path / "candidates.jsonl")
    each = recipe.rollout.prompts * recipe.rollout.group_size
    written = len(read_records(file.path)) // each if file.path.exists() else 0
    start = min(written, len(run.metrics()))  # a step's metrics come after its completions
    file.truncate(start)
    run.truncate(start)
    engine = Engine(lm, dtype="model")
    with stop_on_signal() as stop, run.progress(recipe.steps, "rejection sampling", start) as advance:
        for step in range(start, recipe.steps):
            began = time.perf_counter()
            engine.forget()  # prefixes of earlier steps, which a resumed run would not have
            rows = _step(engine, tokenizer, recipe, step)
            for row in rows:
                file.append(step + 1, row)
            file.sync()
            right = sum(row["verdict"] == "correct" for row in rows)
            tokens = sum(row["tokens"] for row in rows)
            run.samples(step + 1, rows[:: max(1, each // 4)])
            seconds = time.perf_counter() - began
            run.log(step + 1, {"correct": right / each, "tokens": tokens, "seconds": seconds})
            advance(f"right {right / each:.0%}")
            if stop.requested and step + 1 < recipe.steps:
                raise KeyboardInterrupt
    file.close()


def _step(engine: Engine, tokenizer: Tokenizer, recipe: RejectionRecipe, step: int) -> list[Row]:
    """The judged completions of step `step`, a pure function of the weights and (seed, step)."""
    settings, task = recipe.rollout, recipe.task
    first = step * settings.prompts
    problems = [task.problem("train", first + i, recipe.seed) for i in range(settings.prompts)]
    params = sampling(settings, task, [derived_seed(recipe.seed, step, i) for i in range(settings.prompts)])
    prompts = [encoded(tokenizer, task, problem) for problem in problems]
    with by_task(task, problems) as judging:
        completions = engine.generate(prompts, params, ended=lambda i, completion: judging.add(i, completion.text))
        each = judging.each([[c.text for c in group] for group in completions])
        verdicts = refuse_failures(each, problems, [len(group) for group in completions], step)
    return [
        {
            "key": problem.key,
            "messages": [*task.messages(problem), {"role": "assistant", "content": completion.text}],
            "completion": completion.text,
            "verdict": verdict.kind,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for problem, group, judged in zip(problems, completions, verdicts, strict=True)
        for completion, verdict in zip(group, judged, strict=True)
    ]


def _general(section: GeneralSection | None, seed: int) -> Iterator[Row]:
    """Conversations that are added as they are: a task's own solutions, or rows of files in an order of their own."""
    if section is None:
        return
    if section.task is not None:
        for index in range(section.rows):
            problem = section.task.problem("train", index, seed)
            solution = section.task.solution(problem, random.Random(f"{seed}/{index}/general"))
            yield {"messages": [*section.task.messages(problem), {"role": "assistant", "content": solution}]}
        return
    rows = list(read_rows(section.paths))
    random.Random(f"{seed}/general").shuffle(rows)
    for where, row in rows[: section.rows]:
        if not isinstance(row.get("messages"), list):
            raise ValueError(f"{where}: field 'messages' must be a list of messages with role and content")
        yield {"messages": row["messages"]}
