"""The reward court: try a reward function with every cheat we know, and see which ones it pays.

A reward is a function (prompt, completion, truth) -> number or `Verdict`, read as the trainer reads it. The cases lie
beside this file, in cases/: `cheats.jsonl` and `honest.jsonl` for answers, `programs.toml` for programs. A case is
*paid* when it earns more than nothing and more than an ordinary wrong answer does, so that a reward may give something
for the form alone. Rewards run in a process of their own that is killed and replaced when one hangs or takes its
process with it.
"""

import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from luciola.verify import answer, code
from luciola.verify.reward_function import RewardFunction, call, load, why
from luciola.verify.verdict import Verdict

CASES = Path(__file__).with_name("cases")
SECONDS = 20.0  # for one call; a program may use some ten
_START_SECONDS = 120.0  # for importing the module of a reward, torch perhaps included

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
    programs: list[tuple[str, str, str, Role]] = [
        ("a wrong function", "function", "def nth_prime(n):\n    return 4\n", "wrong"),
        ("a wrong program", "stdin", "print(4)\n", "wrong"),
        ("an honest function", "function", table["honest"], "honest"),
        ("an honest program", "stdin", table["honest_stdin"], "honest"),
        *((row["name"], row["form"], row["program"], "cheat") for row in table["attack"]),
    ]
    return [
        Case(name, prompts[form], f"<think>work</think>\n```python\n{program.strip()}\n```", truths[form], role)
        for name, form, program, role in programs
    ]


def try_reward(name: str, cases: list[Case], seconds: float = SECONDS) -> Iterator[Finding]:
    """What the reward does with each case, in their order.

    Raises:
        ValueError: there is no such reward, or its module cannot be imported.
    """
    judge = _Process(name)
    try:
        wrong = 0.0
        for case in sorted(cases, key=lambda case: case.role != "wrong"):
            reward, failure, detail = judge.ask(case, seconds)
            if failure is None and case.role == "wrong":
                wrong = max(wrong, reward)
            paid = reward > (0.0 if case.role == "wrong" else wrong)
            yield Finding(case, failure or ("paid" if paid else "unpaid"), reward, detail)
    finally:
        judge.end()


class _Process:
    """The process in which a reward runs; a new one after each that had to be killed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, case: Case, seconds: float) -> tuple[float, Literal["timeout", "crash"] | None, str]:
        pipe = self._running()
        try:
            pipe.send((case.prompt, case.completion, case.truth))
            if not pipe.poll(seconds):
                self.end()
                return 0.0, "timeout", f"no reward within {seconds:g} seconds"
            reward, failure, detail = pipe.recv()
            return reward, failure, detail
        except (EOFError, OSError):
            self.end()
            return 0.0, "crash", "the reward ended its process"

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _running(self) -> Connection:
        if self._process is None or self._pipe is None:
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._name, theirs), daemon=False)
            self._process.start()
            theirs.close()
            try:
                problem = self._pipe.recv() if self._pipe.poll(_START_SECONDS) else "its module does not load in time"
            except EOFError:
                problem = "its module ended the process"
            if problem:
                self.end()
                raise ValueError(f"the reward {self._name}: {problem}")
        return self._pipe


def _serve(name: str, pipe: Connection) -> None:
    try:
        reward = load(name)
    except (Exception, SystemExit) as error:
        pipe.send(why(error))
        return
    pipe.send("")
    while True:
        try:
            case: Any = pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send(_judged(reward, case))


def _judged(
    reward: RewardFunction, case: tuple[str, str, str]
) -> tuple[float, Literal["timeout", "crash"] | None, str]:
    try:
        verdict = call(reward, *case)
    except (Exception, SystemExit) as error:
        return 0.0, "crash", why(error)
    # A verdict "timeout" or "crash" is an outcome like any other: it was given in time, and earns nothing.
    kind = "" if verdict.kind == "correct" else verdict.kind
    return verdict.reward, None, f"{kind} {verdict.detail}".strip()
