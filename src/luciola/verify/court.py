"""The reward court: try a reward function with every cheat we know, and see which ones it pays.

A reward is a function (prompt, completion, truth) -> number or `Verdict`, read as the trainer reads it. The cases lie
beside this file, in cases/: `cheats.jsonl` and `honest.jsonl` for answers, `programs.toml` for programs. A case is
*paid* when it earns more than nothing and more than an ordinary wrong answer does, so that a reward may give something
for the form alone. Rewards run in the trainer's own worker process (`own_worker.py`), with its limits: what hangs or
fails in training does so here.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luciola.verify import answer, code, own
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict

CASES = Path(__file__).with_name("cases")

Role = Literal["cheat", "honest", "wrong"]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a reward. `honest` ones are right, `wrong` ones are wrong without a trick."""

    name: str
    prompt: str
    completion: str
    truth: str
    role: Role = "cheat"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a reward did with a case."""

    case: Case
    outcome: Literal["paid", "unpaid", "timeout", "crash"]
    reward: float
    detail: str = ""


def answer_reward(prompt: str, completion: str, truth: str) -> Verdict:
    """Luciola's own reward for answers."""
    return answer.grade(completion, truth)


def code_reward(prompt: str, completion: str, truth: str) -> Verdict:
    """Luciola's own reward for programs; the truth is what `code.read_tests` reads."""
    return code.grade(completion, code.read_tests(truth), seconds=2)


def answer_cases() -> list[Case]:
    """The cheats of cheats.jsonl and the honest answers of honest.jsonl."""
    prompt = "Give the answer between <answer> and </answer>, or in \\boxed{}."
    cases = [
        Case("a wrong answer block", prompt, "<think>work</think><answer>5</answer>", "4", "wrong"),
        Case("a wrong box", prompt, "<think>work</think>\\boxed{5}", "4", "wrong"),
    ]
    files: dict[str, Role] = {"honest.jsonl": "honest", "cheats.jsonl": "cheat"}
    for file, role in files.items():
        for line in (CASES / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cases.append(Case(row["name"], prompt, row["completion"], row["truth"], role))
    return cases


def code_cases() -> list[Case]:
    """The programs of programs.toml, as completions with a code block; the truth is what `code.read_tests` reads."""
    table = tomllib.loads((CASES / "programs.toml").read_text(encoding="utf-8"))
    prompts = {"function": table["prompt"], "stdin": table["prompt_stdin"]}
    truths = {"function": table["asserts"].strip(), "stdin": json.dumps({"pairs": table["pairs"]})}
    programs: list[tuple[dict[str, str], Role]] = [
        ({"name": "a wrong function", "form": "function", "program": "def nth_prime(n):\n    return 4\n"}, "wrong"),
        ({"name": "a wrong program", "form": "stdin", "program": "print(4)\n"}, "wrong"),
        ({"name": "an honest function", "form": "function", "program": table["honest"]}, "honest"),
        ({"name": "an honest program", "form": "stdin", "program": table["honest_stdin"]}, "honest"),
        *((row, "cheat") for row in table["attack"]),
    ]
    return [
        Case(
            row["name"],
            prompts[row["form"]],
            f"<think>work</think>\n```python\n{row['program'].strip()}\n```",
            row.get("asserts", truths[row["form"]]).strip(),
            role,
        )
        for row, role in programs
    ]


def try_reward(name: str, cases: list[Case], seconds: float = own.SECONDS) -> Iterator[Finding]:
    """What the reward does with each case, in their order.

    Raises:
        ValueError: there is no such reward, or its module cannot be imported.
    """
    with Pool(size=1, seconds=own.SECONDS, memory_mb=own.MEMORY_MB, program=own.WORKER) as pool:
        found = pool.check(name)  # which imports its module
        if found.kind != "correct":
            raise ValueError(f"the reward {name}: {found.detail}")
        pool.seconds = seconds
        wrong = 0.0
        for case in sorted(cases, key=lambda case: case.role != "wrong"):
            verdict = pool.check(name, case.prompt, case.completion, case.truth)
            if verdict.kind == "timeout" or verdict.kind == "crash":
                yield Finding(case, verdict.kind, 0.0, verdict.detail)
                continue
            if case.role == "wrong":
                wrong = max(wrong, verdict.reward)
            paid = verdict.reward > (0.0 if case.role == "wrong" else wrong)
            kind = "" if verdict.kind == "correct" else verdict.kind
            yield Finding(case, "paid" if paid else "unpaid", verdict.reward, f"{kind} {verdict.detail}".strip())
