"""Verifiers on this machine: maths answers and sandboxed Python programs judged a second, all cores at work.

Half of the cases are right. Answers come eight to a reference, as in a GRPO step; half of the references are numbers,
an eighth each are fractions, lengths, intervals, and algebra; the last goes to SymPy, every answer in another form.
Programs are functions tested by asserts, which takes two sandboxes (`luciola.verify.code`), or programs that print,
which take one for each input. C++ is left out, as its compiler would be what is measured.

The workers that do algebra have started before the clock runs, as in any run after its first step. Sandboxes start anew
for every program, always.
"""

from __future__ import annotations

import time
from typing import Any

from luciola.bench.turns import machine
from luciola.verify import answer, code, pool, sandbox
from luciola.verify.verdict import Verdict

PEERS: tuple[str, ...] = ()
REFERENCES, GROUP, PROGRAMS, ROUNDS = 256, 8, 64, 3


def run() -> dict[str, Any]:
    """Answers and programs a second: the median of three rounds, with the slowest and the fastest.

    Raises:
        SandboxError: programs cannot be run safely here.
        RuntimeError: a verdict is not the one that is due, so that the rates would mean nothing.
    """
    if reason := sandbox.unavailable():
        raise sandbox.SandboxError(reason)
    rates: dict[str, list[float]] = {"answers": [], "functions": [], "printing_programs": []}
    with pool.Pool() as algebra:
        algebra.check_many([(f"x+{i}", f"{i}+x") for i in range(8 * algebra.size)])
        for round_number in range(ROUNDS):
            pairs = answers(round_number)
            began = time.perf_counter()
            verdicts = answer.grade_many(pairs, pool=algebra)
            rates["answers"].append(_rate(verdicts, began))
            for name, cases in programs(round_number).items():
                began = time.perf_counter()
                rates[name].append(_rate(code.grade_many(cases), began))
    result: dict[str, Any] = {}
    for name, found in rates.items():
        slowest, median, fastest = sorted(found)
        result |= {f"{name}_per_second": median, f"{name}_slowest": slowest, f"{name}_fastest": fastest}
    sizes = {"references": REFERENCES, "answers_a_reference": GROUP, "programs": PROGRAMS, "languages": "Python"}
    return {**result, **sizes, **machine("math-verify", "sympy")}


def answers(round_number: int) -> list[tuple[str, str]]:
    """(completion, reference): the right and the wrong answers by turns."""
    found = []
    for i in range(REFERENCES):
        n = 1000 * round_number + i + 2
        for j in range(GROUP):
            wrong = j % 2 * (j + 1)  # 0 every other time
            m, blank = n + wrong, " " * (j // 2)
            text, truth = (
                (f"{m:,}", f"{n}"),
                (f"x = {m}", f"{n}"),
                (f"{m}.{'0' * j}", f"{n}"),
                (f"{m}", f"{n:,}"),
                (f"\\frac{{{m * (j + 2)}}}{{{7 * (j + 2)}}}", f"\\frac{{{n}}}{{7}}"),
                (f"{m}{blank} \\text{{ cm}}", f"{n}\\,\\mathrm{{cm}}"),
                (f"[{m / 2:.1f}{'0' * j}, {n + 9})" if j < 4 else f"\\frac{{{m * j}}}{{{2 * j}}} \\le x < {n + 9}",
                 f"[\\frac{{{n}}}{{2}}, {n + 9})"),
                (f"{m}x{blank}+ (x+{j})^2 - x^2 - {2 * j}x - {j * j}", f"{n}x") if i % 16 < 8 else
                (f"\\sqrt{{{(j + 1) ** 2 * (m * m + 1)}}} / {j + 1}", f"\\sqrt{{{n * n + 1}}}"),
            )[i % 8]  # fmt: skip
            found.append((f"<think>It has to be {n}.</think>\nSo the answer is \\boxed{{{text}}}.", truth))
    return found


def programs(round_number: int) -> dict[str, list[tuple[str, code.Tests]]]:
    """(completion, tests) of either kind: the right and the wrong programs by turns."""
    kinds: dict[str, list[tuple[str, code.Tests]]] = {"functions": [], "printing_programs": []}
    for i in range(PROGRAMS):
        n, wrong = 1000 * round_number + i, i % 2
        body = f"def total(items):\n    result = {n}\n    for item in items:\n        result += item\n    return result"
        tests = tuple(f"assert total(list(range({k}))) == {n + k * (k - 1) // 2 + wrong}" for k in (0, 10, 1000))
        kinds["functions"].append((_fenced(body), code.Asserts(tests, ("total",))))
        pairs = (("1 2 3\n", f"{n + 6 + wrong}\n"),)
        kinds["printing_programs"].append(
            (_fenced(f"{body}\nprint(total(map(int, input().split())))"), code.Pairs(pairs))
        )
    return kinds


def _fenced(program: str) -> str:
    return f"<think>A loop will do.</think>\n```python\n{program}\n```"


def _rate(verdicts: list[Verdict], began: float) -> float:
    """Verdicts a second, after a look that the right and the wrong were told apart."""
    seconds = time.perf_counter() - began
    for place, verdict in enumerate(verdicts):
        if verdict.kind != ("wrong" if place % 2 else "correct"):
            raise RuntimeError(f"case {place} was judged {verdict.kind} ({verdict.detail}), which it is not")
    return len(verdicts) / seconds
