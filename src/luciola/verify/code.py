"""Grade a program against tests that it never sees: the code reward of R1 (report, section 2.2.2).

Which text is the program? All of this looks only at what follows the thinking:

| there                        | the program                                                                           |
| ---------------------------- | ------------------------------------------------------------------------------------- |
| are fenced blocks (``` ~~~)  | the last that names the tests' language; else the last that names none; else the last |
| is a block that does not end | none                                                                                  |
| is an <answer> block         | what is in it                                                                         |
| is neither                   | all of it                                                                             |

A fenced program may be indented. A program passes all tests or is wrong. Tests come in two kinds:

| tests     | how a program is tested                                                                              |
| --------- | ---------------------------------------------------------------------------------------------------- |
| `Pairs`   | run anew for each input; its output must be the expected one, blanks at the end of lines apart, and  |
|           | its exit code 0                                                                                      |
| `Asserts` | Python only: the tests run in one sandbox and call the program's functions in another (`inside.py`)  |

Expected results never enter the sandbox of the program. So whatever it does there (exit early, patch `==`, return
objects that equal everything, look through frames and files), it has to return or print the right thing.

A program that runs into a limit is wrong, as it is the program that is too slow or too large; and so is one whose
result is an object that tests for plain values cannot use (`carried.py`). "timeout" and "crash" are
about the tests: they did not end, use a name that neither they nor Python define, hand over what cannot be carried, or
never call the program.
"""

import ast
import builtins
import json
import os
import re
import shutil
import symtable
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

from luciola import hardware
from luciola.verify import sandbox
from luciola.verify.extract import Found, after_thinking
from luciola.verify.verdict import Verdict, correct, no_answer, wrong

__all__ = ["Asserts", "Pairs", "Tests", "extract", "grade", "grade_many", "read_tests", "tests_of", "without_compiler"]

Language = Literal["python", "c++"]
MAX_PROGRAM = 100_000  # characters
SECONDS = 5.0  # for each pair, or for all asserts together
MEMORY_MB = 512
_COMPILE_SECONDS, _COMPILE_MB = 30.0, 1024
_GRACE = 5.0  # seconds that the sandbox of the tests has on top, for its start and its verdict

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`\n]*")
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
_NAMES = {"python": ("python", "py", "python3"), "c++": ("c++", "cpp", "cc", "cxx")}  # of languages, on a fence
# A C++ program may recurse as deep as its memory goes. Its threads would each reserve as large a stack; they keep 8 MB.
_THREADS = b"""#include <pthread.h>
__attribute__((constructor)) static void small_stacks() {
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 8 << 20);
    pthread_setattr_default_np(&small);
}
"""
_INSIDE = {name: Path(__file__).with_name(name).read_bytes() for name in ("inside.py", "carried.py")}


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
        classes: which of the names are classes, whose objects the tests may use; by default those with a capital first.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...] = ()
    given: str = ""
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("`tests` is empty, so every program would pass; give at least one assert")
        used = _free_names("\n".join(filter(None, (self.given, *self.tests))))
        if not self.names:
            object.__setattr__(self, "names", tuple(sorted(used)))
        if not self.names:
            raise ValueError("`tests` take no name from the program, so they test nothing of it; call its functions")
        if self.classes is None:
            object.__setattr__(self, "classes", tuple(name for name in self.names if name[0].isupper()))

    @classmethod
    def of_human_eval(cls, row: Mapping[str, Any]) -> "Asserts":
        """A row of HumanEval: `prompt`, `test` with a function check(candidate), and `entry_point`.

        A completion may be the body of the function that the prompt begins, or a program in a fence. The tests have the
        prompt too, and so helper functions of its own.
        """
        name = row["entry_point"]
        return cls((f"{row['test']}\n\ncheck({name})",), (name,), row["prompt"], classes=())

    @classmethod
    def of_mbpp(cls, row: Mapping[str, Any]) -> "Asserts":
        """A row of MBPP: `test_list`, `test_setup_code`, and the reference `code`, whose functions are tested."""
        with warnings.catch_warnings():  # of escapes such as "\\w" in what others wrote
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            body = ast.parse(row["code"]).body
        tests = tuple(row["test_list"])
        nodes = ast.walk(ast.parse("\n".join(tests)))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}  # some are called like a built-in function
        functions, classes = (
            sorted({node.name for node in body if isinstance(node, kind)} & used)
            for kind in (ast.FunctionDef, ast.ClassDef)
        )
        return cls(tests, (*functions, *classes), row.get("test_setup_code", ""), tuple(classes))


Tests = Pairs | Asserts
FIELDS = {field.name for kind in (Pairs, Asserts) for field in fields(kind)}


def read_tests(truth: str) -> Tests:
    """Tests as they stand in a data file: asserts as plain Python, or a JSON object for `tests_of`.

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
    except json.JSONDecodeError as error:
        raise ValueError(f"the tests begin like a JSON object, which must have `pairs` or `tests` ({error})") from None
    tests = tests_of(fields)
    if unknown := set(fields) - FIELDS:
        raise ValueError(f"the tests have an unknown field {min(unknown)!r}; known are {', '.join(sorted(FIELDS))}")
    return tests


def tests_of(fields: Mapping[str, Any]) -> Tests:
    """Tests from the fields of a JSON object, named like those of `Pairs` or `Asserts`; others are passed over.

    Raises:
        ValueError: a field is missing or is not what it should be.
    """
    if ("pairs" in fields) == ("tests" in fields):
        found = ", ".join(fields) or "none"
        raise ValueError(f"the tests must have `pairs` or `tests`, one of the two; the fields are: {found}")
    language: Any = "c++" if fields.get("language") == "cpp" else fields.get("language", "python")
    if "pairs" in fields:
        pairs = fields["pairs"]
        if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
            raise ValueError('`pairs` must be a list of [input, output], two texts each, such as [["1 2\\n", "3\\n"]]')
        return Pairs(tuple((str(read), str(printed)) for read, printed in pairs), language)
    if language != "python":
        raise ValueError(f"`tests` are asserts and test Python; a program in {language!r} is tested by `pairs`")
    given = fields.get("given", "")
    if not isinstance(given, str):
        raise ValueError("`given` must be a text, the code that stands before the program")
    classes = None if fields.get("classes") is None else _texts(fields, "classes")
    return Asserts(_texts(fields, "tests"), _texts(fields, "names"), given, classes)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str | int | float) for text in pair)


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = fields.get(name, [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"`{name}` must be a text or a list of texts, none of them empty")
    return tuple(texts)


def extract(completion: str, language: Language = "python") -> str | None:
    """The program in a completion, or None."""
    return _find(completion, language).answer


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
    found = _find(completion, "python" if isinstance(tests, Asserts) else tests.language)
    if found.answer is None:
        return no_answer(found.why)
    if len(found.answer) > MAX_PROGRAM:
        return wrong(f"the program is longer than {MAX_PROGRAM} characters")
    if isinstance(tests, Pairs):
        return _run_pairs(_encoded(dedent(found.answer)), tests, seconds, memory_mb)
    unfinished = tests.given.rstrip().rpartition("\n")[2][:1].isspace()  # a function, whose body the program may be
    parts = ("", f"{tests.given}\n{found.answer}") if unfinished else (tests.given, dedent(found.answer))
    files = {name: _encoded(text) for name, text in zip(("given.py", "solution.py"), parts, strict=True)}
    return _run_asserts(files, tests, seconds, memory_mb)


def without_compiler() -> str:
    """Why programs in C++ cannot be judged on this machine, and the mend; "" where they can."""
    if shutil.which("g++", path="/usr/bin:/bin"):  # the sandbox has no other folders of programs
        return ""
    return "programs in C++ need g++ in /usr/bin; install it (Debian, Ubuntu: apt-get install g++)"


def grade_many(pairs: Sequence[tuple[str, Tests]]) -> list[Verdict]:
    """`grade` for every (completion, tests), side by side; verdicts in the order of the pairs."""
    with ThreadPoolExecutor(hardware.cores()) as threads:
        return list(threads.map(lambda pair: grade(*pair), pairs))


def _find(completion: str, language: Language) -> Found:
    reply = after_thinking(completion)
    if reply.answer is None:
        return reply
    blocks, open_fence = _blocks(reply.answer)
    if open_fence:
        return Found(None, "a code block that does not end")
    if blocks:
        named = [text for name, text in blocks if name in _NAMES[language]]
        return Found((named or [text for name, text in blocks if not name] or [text for _, text in blocks])[-1])
    answer = _ANSWER.search(reply.answer)
    program = answer[1] if answer else reply.answer
    return Found(program) if program.strip() else Found(None, "nothing after the thinking")


def _blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """(language, content) of the fenced blocks, each without its fence's indentation; and whether one does not end."""
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    opening = None
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if opening is None:
            opening, lines = fence, []
        elif fence and fence[2].startswith(opening[2]) and not fence[3]:
            blocks.append((opening[3].strip("{.}").lower(), "".join(lines)))
            opening = None
        else:
            indent = len(opening[1])
            lines.append(line[:indent].lstrip() + line[indent:] + "\n")
    return blocks, opening is not None


def _encoded(program: str) -> bytes:
    return program.encode(errors="replace")


def _run_asserts(program: Mapping[str, bytes], tests: Asserts, seconds: float, memory_mb: int) -> Verdict:
    used, free = (_free_names("\n".join(texts)) for texts in (tests.tests, (tests.given, *tests.tests)))
    names = set(tests.names)
    task = {**asdict(tests), "seconds": seconds, "used": sorted(used & names), "missing": sorted(free - names)}
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
            files={**_INSIDE, **program},
        )
        with answering:
            asking = sandbox.Program(
                [*sandbox.PYTHON, "/tmp/inside.py", "tests", str(call), str(replies)],
                seconds=seconds + _GRACE,
                files={**_INSIDE, "tests.json": json.dumps(task).encode()},
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
        if reason := without_compiler():
            raise sandbox.SandboxError(reason)
        compiled = sandbox.run(
            ["sh", "-c", "g++ -std=c++20 -O1 -x c++ solution.cpp threads.cpp -o program && cat program"],
            seconds=_COMPILE_SECONDS,
            memory_mb=_COMPILE_MB,
            output_mb=16,
            files={"solution.cpp": program, "threads.cpp": _THREADS},
        )
        if compiled.status != "ok":
            return wrong(_at_limit(compiled, _COMPILE_SECONDS, _COMPILE_MB) or "the program does not compile")
        argv = ["prlimit", f"--stack={memory_mb << 20}", "--", "/tmp/program"]
        files = {"program": compiled.stdout}
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


@lru_cache(maxsize=4096)  # as the same tests judge many programs
def _free_names(code: str) -> frozenset[str]:
    """The names that `code` uses and does not define, apart from Python's own.

    Raises:
        ValueError: it is no Python.
    """
    try:
        module = symtable.symtable(code, "tests", "exec")
    except SyntaxError as error:
        raise ValueError(f"the tests are no Python (line {error.lineno}: {error.msg})") from None
    scopes, used, defined = [module], frozenset[str](), frozenset(dir(builtins))
    for scope in scopes:
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if scope is module or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                defined |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return used - defined
