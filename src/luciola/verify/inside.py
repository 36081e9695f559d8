"""What runs inside the sandboxes of `code.py`: a program that answers calls, and the tests that make them.

The program and its tests are two processes in two sandboxes, joined by two pipes. Nothing but plain values goes
through, as lines of JSON: arguments one way, results the other. So the program never meets an expected result, nor the
code that compares: it cannot read, patch, or leave them, and an object that says it equals everything does not get
across. A program that writes the replies by hand has gained nothing, since it has to know the right results.

    python inside.py program               answers calls of solution.py's functions: calls on stdin, replies on stdout
    python inside.py tests CALLS REPLIES   runs tests.json over these two descriptors; its verdict on stdout

`carried.py`, which lies beside this file there too, says how each kind of value is carried. Nothing else of ours can be
imported here: the sandbox has the standard library alone.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import select
import signal
import sys
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing is a fifth of the time in which Python starts
    from collections.abc import Callable
    from typing import Any, NoReturn

    from luciola.verify.carried import Object, Objects, TestsFault, decode, encode
else:
    sys.path.append("/tmp")
    from carried import Object, Objects, TestsFault, decode, encode

MAX_REPLY = 8 << 20  # bytes


class Failed(BaseException):
    """The program can no longer pass: it ended, was late, or replied with what is no value. Not for tests to catch."""


class Caller:
    """The program, seen from the tests."""

    def __init__(self, calls: int, replies: int, seconds: float) -> None:
        self._calls, self._replies, self._waiting = calls, replies, b""
        self._deadline = time.monotonic() + seconds
        self._exceptions: dict[str, type[Exception]] = {}
        self.count, self.failure = 0, ""
        self.made: set[int] = set()  # the places of what the tests have made

    def names(self, names: list[str], classes: list[str]) -> dict[str, Any]:
        """What the program defines of these, once its own code has run."""
        self.reply()
        module, found = Object(self, 0, fresh=True), {}
        for name in names:
            try:
                found[name] = value = getattr(module, name)
            except AttributeError:
                continue
            if name in classes and isinstance(value, Object):
                value.__dict__.update(_fresh=True, _makes=True)
        self.count = 0
        return found

    def ask(self, operation: str, arguments: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
        """What the program answers; or what it raised is raised here too."""
        try:
            question = [operation, encode(arguments), encode(named or {})]
        except TestsFault as fault:
            if operation == "call" and arguments[0]._demanded():
                raise
            self.fail(f"{fault}, which returned an object to be asked")  # where a plain value would not have to be
        try:
            with os.fdopen(os.dup(self._calls), "w") as pipe:
                pipe.write(json.dumps(question) + "\n")
        except OSError:  # among them the broken pipe of a program that has ended
            self.fail("the program ended before it answered")
        value, changed = self.reply(may_end=operation == "__next__")
        for mine, theirs in zip((*arguments[1:], *(named or {}).values()), changed, strict=False):
            if isinstance(mine, list | dict | set | deque | bytearray) and type(mine) is type(theirs):
                mine.clear()
                add: Any = mine.update if isinstance(mine, dict | set) else mine.extend
                add(theirs)
        return value

    def reply(self, may_end: bool = False) -> tuple[Any, list[Any]]:
        """The program's next result, and what it made of the arguments."""
        line = self._line()
        try:
            kind, content, *more = json.loads(line)
            content, changed = decode(content, self), decode(more, self)
            error = self._error(*content) if kind == "raised" else None
        except Exception:
            self.fail("the program's reply is no value")
        self.count += 1
        if kind == "value":
            return content, changed
        if error is not None:
            raise error
        if kind == "end" and may_end:
            raise StopIteration
        self.fail(str(content))

    def object(self, place: int) -> Object:
        return Object(self, place)

    def exception(self, names: list[str]) -> type[Exception]:
        """The class that has these names from itself up to `object`: a built-in one, or a stand-in below one.

        Only the end of an iteration is no exception to hand on: it would end a loop of the tests and pass for success.
        """
        kind: type[Exception] = RuntimeError
        for name in reversed(names):
            known = getattr(builtins, name, None)
            if name in ("StopIteration", "StopAsyncIteration"):
                kind = RuntimeError
            elif isinstance(known, type) and issubclass(known, Exception):
                kind = known
            elif known is None:
                kind = self._exceptions.setdefault(name, type(str(name), (kind,), {}))
        return kind

    def _error(self, names: list[str], arguments: list[Any]) -> Exception:
        try:
            return self.exception(names)(*arguments)
        except TypeError:  # a class that is not made from what its `args` say
            return RuntimeError(*arguments)

    def fail(self, why: str) -> NoReturn:
        self.failure = self.failure or why
        raise Failed(why)

    def _line(self) -> bytes:
        while b"\n" not in self._waiting:
            ready, _, _ = select.select([self._replies], [], [], max(0.0, self._deadline - time.monotonic()))
            if not ready:
                self.fail("the program did not answer in time")
            piece = os.read(self._replies, 1 << 20)
            if not piece:
                self.fail("the program ended before it answered")
            self._waiting += piece
            if len(self._waiting) > MAX_REPLY:
                self.fail("the program's reply is too long")
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line


def run_tests(task: dict[str, Any], calls: int, replies: int) -> tuple[str, str]:
    """The kind of a verdict, and why; nothing that a program does may lead to "crash", a fault of the tests."""
    program = Caller(calls, replies, task["seconds"])

    def late(*_: object) -> None:
        program.fail("the tests did not end in time on what the program returned")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, task["seconds"] + 0.5)
    namespace: dict[str, Any] = {"__name__": "tests"}
    number = 0
    try:
        try:
            compiled = [compile(text, "tests", "exec", dont_inherit=True) for text in task["tests"]]
            exec(compile(task["given"], "given", "exec", dont_inherit=True), namespace)
        except Exception as error:
            return "crash", f"the tests cannot be run: {_describe(error)}"
        found = program.names(task["names"], task["classes"])
        values = [name for name in task["used"] if not isinstance(found.get(name, program), Object | Caller)]
        namespace.update(found)
        for code in compiled:
            number += 1
            exec(code, namespace)
    except TestsFault as error:
        return "crash", f"test {number} cannot be run: {error}"
    except Failed:
        pass
    except BaseException as error:
        if isinstance(error, NameError) and error.name in task["missing"]:  # what the program raised has no such `name`
            return "crash", f"test {number} cannot be run: {error}"
        return "wrong", f"test {number} of {len(task['tests'])} failed: {_describe(error)}"
    if program.failure:
        return "wrong", program.failure
    return ("correct", "") if program.count or values else ("crash", "the tests never call the program")


def answer_calls() -> None:
    """The program's side: run solution.py, then answer call after call."""
    calls, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1):  # what the program prints is no reply
        os.dup2(nowhere, stream)
    module = sys.modules["solution"] = type(sys)("solution")
    objects = Objects(module)

    def reply(kind: str, content: Any, *changed: Any) -> None:
        replies.write(json.dumps([kind, content, *changed]) + "\n")
        replies.flush()

    try:
        for name in ("given.py", "solution.py"):
            with open(f"/tmp/{name}", encoding="utf-8") as file:
                exec(compile(file.read(), name, "exec", dont_inherit=True), module.__dict__)
        reply("value", None)
    except BaseException as error:
        reply("failed", f"the program does not run: {_describe(error)}")
        return
    for line in calls:
        operation, arguments, named = json.loads(line)
        try:
            given, named = decode(arguments, objects), decode(named, objects)
            value = _operation(operation)(*given, **named)
            changed = [encode(part, objects) for part in (*given[1:], *named.values())] if value is None else []
            reply("value", encode(value, objects), *changed)
        except BaseException as error:
            if operation == "__next__" and isinstance(error, StopIteration):
                reply("end", None)
            else:
                reply("raised", [[kind.__name__ for kind in type(error).__mro__], _arguments(error)])


def _operation(name: str) -> Callable[..., Any]:
    if name == "call":
        return lambda function, *arguments, **named: function(*arguments, **named)
    function: Callable[..., Any] = vars(operator).get(name) or getattr(builtins, name.strip("_"))
    return function


def _arguments(error: BaseException) -> list[Any]:
    try:
        return [encode(part) for part in error.args]
    except BaseException:
        return [_describe(error)]


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "Exception: without a description"


if __name__ == "__main__":
    if sys.argv[1] == "program":
        answer_calls()
    else:
        with open("/tmp/tests.json", encoding="utf-8") as file:
            task = json.load(file)
        verdict = os.dup(1)
        nowhere = os.open("/dev/null", os.O_RDWR)
        for stream in (1, 2):  # tests may print, however much the program returned
            os.dup2(nowhere, stream)
        kind, detail = run_tests(task, int(sys.argv[2]), int(sys.argv[3]))
        os.write(verdict, json.dumps({"kind": kind, "detail": detail}).encode())
        os._exit(0)
