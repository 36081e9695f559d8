"""Grade a program against tests that it never sees: the code reward of R1 (report, section 2.2.2).

Which text is the program? What follows the thinking; there the last fenced block, which must be closed, or the whole of
it where there is no fence at all. A program passes all tests or is wrong. Tests come in two kinds:

| tests     | how a program is tested                                                                              |
| --------- | ---------------------------------------------------------------------------------------------------- |
| `Pairs`   | run anew for each input; its output must be the expected one, blanks at the end of lines apart, and  |
|           | its exit code 0                                                                                      |
| `Asserts` | Python only: the tests run in one sandbox and call the program's functions in another (`inside.py`)  |

Expected results never enter the sandbox of the program. So whatever it does there (exit early, patch `==`, return
objects that equal everything, look through frames and files), it has to return or print the right thing.

A program that runs into a limit is wrong, as it is the program that is too slow or too large. "timeout" and "crash" are
about the tests: they did not end, could not be run, or never called the program.
"""

import ast
import builtins
import json
import os
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luciola import hardware
from luciola.verify import sandbox
from luciola.verify.extract import Found, after_thinking
from luciola.verify.verdict import Verdict, correct, no_answer, wrong

__all__ = ["Asserts", "Pairs", "Tests", "extract", "grade", "grade_many", "read_tests"]

Language = Literal["python", "c++"]
MAX_PROGRAM = 100_000  # characters
SECONDS = 5.0  # for each pair, or for all asserts together
MEMORY_MB = 512
_COMPILE_SECONDS, _COMPILE_MB = 30.0, 1024
_GRACE = 5.0  # seconds that the sandbox of the tests has on top, for its start and its verdict

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*$", re.MULTILINE)
_INSIDE = Path(__file__).with_name("inside.py").read_bytes()


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the program reads on stdin, and what it must then print."""

    pairs: tuple[tuple[str, str], ...]
    language: Language = "python"

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("`pairs` is empty, so every program would pass; give at least one (input, output)")
        if self.language not in ("python", "c++"):
            raise ValueError(f'`language` is {self.language!r}; programs may be in "python" or "c++"')


@dataclass(frozen=True, slots=True)
class Asserts:
    """Python statements that fail unless the program's functions do what they should.

    Args:
        tests: pieces of code, each one test.
        names: what the tests take from the program; by default all they use and do not define, built-ins apart.
        given: code that stands before the program and before the tests, such as imports.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...] = ()
    given: str = ""

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("`tests` is empty, so every program would pass; give at least one assert")
        if not self.names:
            object.__setattr__(self, "names", _free_names("\n".join((self.given, *self.tests))))

    @classmethod
    def of_human_eval(cls, row: Mapping[str, Any]) -> "Asserts":
        """A row of HumanEval: `prompt`, `test` with a function check(candidate), and `entry_point`.

        A completion may be the body of the function that the prompt begins, or a program in a fence. The tests have the
        prompt too, and so helper functions of its own.
        """
        name = row["entry_point"]
        return cls((f"{row['test']}\n\ncheck({name})",), (name,), row["prompt"])

    @classmethod
    def of_mbpp(cls, row: Mapping[str, Any]) -> "Asserts":
        """A row of MBPP: `test_list`, `test_setup_code`, and the reference `code`, whose functions are tested."""
        with warnings.catch_warnings():  # of escapes such as "\\w" in what others wrote
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            body = ast.parse(row["code"]).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {
            node.id for test in row["test_list"] for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)
        }
        return cls(tuple(row["test_list"]), tuple(sorted(defined & used)), row.get("test_setup_code", ""))


Tests = Pairs | Asserts


def read_tests(truth: str) -> Tests:
    """Tests as they stand in a data file: asserts as plain Python, or a JSON object with the fields of either kind.

    Raises:
        ValueError: it is neither.
    """
    text = truth.strip()
    if not text.startswith("{"):
        try:
            return Asserts(tuple(ast.unparse(node) for node in ast.parse(text).body))
        except SyntaxError as error:
            raise ValueError(f"the tests are neither a JSON object nor Python (line {error.lineno})") from None
    try:
        fields = json.loads(text)
        if "pairs" in fields:
            return Pairs(**{**fields, "pairs": tuple((str(read), str(printed)) for read, printed in fields["pairs"])})
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return Asserts(**given)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"the tests must have `pairs` or `tests`, as Pairs and Asserts describe them ({error})"
        ) from None


def extract(completion: str) -> str | None:
    """The program in a completion, or None."""
    return _find(completion).answer


def grade(completion: str, tests: Tests, *, seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> Verdict:
    """Whether the program in `completion` passes all `tests`; reward 1.0 or 0.0.

    Args:
        completion: what the model wrote.
        tests: `Pairs` or `Asserts`; `read_tests` reads them from a text.
        seconds: wall time for each pair, or for all asserts together.
        memory_mb: MB of memory.

    Raises:
        SandboxError: programs cannot be run safely on this machine; the message says how to mend it.
    """
    found = _find(completion)
    if found.answer is None:
        return no_answer(found.why)
    if len(found.answer) > MAX_PROGRAM:
        return wrong(f"the program is longer than {MAX_PROGRAM} characters")
    program = found.answer.encode(errors="replace")
    if isinstance(tests, Asserts):
        return _run_asserts(f"{tests.given}\n".encode() + program, tests, seconds, memory_mb)
    return _run_pairs(program, tests, seconds, memory_mb)


def grade_many(pairs: Sequence[tuple[str, Tests]]) -> list[Verdict]:
    """`grade` for every (completion, tests), side by side; verdicts in the order of the pairs."""
    with ThreadPoolExecutor(hardware.cores()) as threads:
        return list(threads.map(lambda pair: grade(*pair), pairs))


def _find(completion: str) -> Found:
    reply = after_thinking(completion)
    if reply.answer is None:
        return reply
    fences = list(_FENCE.finditer(reply.answer))
    if not fences:
        return reply if reply.answer.strip() else Found(None, "nothing after the thinking")
    if len(fences) % 2:
        return Found(None, "a code block that does not end")
    first, last = fences[-2:]
    return Found(reply.answer[first.end() + 1 : last.start()])


def _run_asserts(program: bytes, tests: Asserts, seconds: float, memory_mb: int) -> Verdict:
    task = {"tests": tests.tests, "names": tests.names, "given": tests.given, "seconds": seconds}
    pipes = [*os.pipe(), *os.pipe()]
    calls, call, replies, reply = pipes
    ends: list[sandbox.Outcome] = []
    try:
        answering = sandbox.Program(
            [*sandbox.PYTHON, "/tmp/inside.py", "program"],
            stdin=calls,
            stdout=reply,
            seconds=seconds + _GRACE,
            memory_mb=memory_mb,
            files={"inside.py": _INSIDE, "solution.py": program},
        )
        with answering:
            asking = sandbox.Program(
                [*sandbox.PYTHON, "/tmp/inside.py", "tests", str(call), str(replies)],
                seconds=seconds + _GRACE,
                files={"inside.py": _INSIDE, "tests.json": json.dumps(task).encode()},
                keep=(call, replies),
            )
            while pipes:
                os.close(pipes.pop())
            with asking:
                watch = threading.Thread(target=lambda: ends.append(answering.wait()))
                watch.start()
                try:
                    outcome = asking.wait()
                finally:
                    answering.stop()
                    watch.join()
    finally:
        while pipes:
            os.close(pipes.pop())
    if outcome.status == "timeout":
        return Verdict("timeout", 0.0, f"the tests did not end within {seconds + _GRACE:g} seconds")
    try:
        said = json.loads(outcome.stdout)
    except ValueError:
        return Verdict("crash", 0.0, f"the tests ended without a verdict ({outcome.status})")
    if said["kind"] == "wrong" and ends and (limit := _at_limit(ends[0], seconds, memory_mb)):
        return wrong(limit)
    return Verdict(said["kind"], float(said["kind"] == "correct"), said["detail"])


def _run_pairs(program: bytes, tests: Pairs, seconds: float, memory_mb: int) -> Verdict:
    if tests.language == "python":
        argv, files = [*sandbox.PYTHON, "/tmp/solution.py"], {"solution.py": program}
    else:
        compiled = sandbox.run(
            ["sh", "-c", "g++ -std=c++20 -O1 -x c++ solution.cpp -o program && cat program"],
            seconds=_COMPILE_SECONDS,
            memory_mb=_COMPILE_MB,
            output_mb=16,
            files={"solution.cpp": program},
        )
        if compiled.status != "ok":
            return wrong(_at_limit(compiled, _COMPILE_SECONDS, _COMPILE_MB) or "the program does not compile")
        argv, files = ["/tmp/program"], {"program": compiled.stdout}
    for number, (given, expected) in enumerate(tests.pairs, 1):
        outcome = sandbox.run(argv, given.encode(), seconds, memory_mb, files=files)
        if limit := _at_limit(outcome, seconds, memory_mb):
            return wrong(f"test {number} of {len(tests.pairs)}: {limit}")
        if outcome.status != "ok":
            last = outcome.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
            return wrong(f"test {number} of {len(tests.pairs)}: exit code {outcome.exit_code} {last}".rstrip())
        if _lines(outcome.stdout.decode(errors="replace")) != _lines(expected):
            return wrong(f"test {number} of {len(tests.pairs)}: not the expected output")
    return correct()


def _at_limit(outcome: sandbox.Outcome, seconds: float, memory_mb: int) -> str:
    limits = {
        "timeout": f"the program did not end within {seconds:g} seconds",
        "memory": f"the program used more than {memory_mb} MB",
        "output": "the program wrote more than its output may hold",
    }
    return limits.get(outcome.status, "")


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().split("\n")]


def _free_names(code: str) -> tuple[str, ...]:
    """The names that `code` uses and does not define, apart from Python's own."""
    nodes = list(ast.walk(ast.parse(code)))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    defined |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return tuple(sorted({node.id for node in names} - defined - set(dir(builtins))))
