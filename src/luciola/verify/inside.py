"""What runs inside the sandboxes of `code.py`: a program that answers calls, and the tests that make them.

The program and its tests are two processes in two sandboxes, joined by two pipes. Nothing but plain values goes
through, as lines of JSON: arguments one way, results the other. So the program never meets an expected result, nor the
code that compares: it cannot read, patch, or leave them, and an object that says it equals everything does not get
across. A program that writes the replies by hand has gained nothing, since it has to know the right results.

    python inside.py program               answers calls of solution.py's functions: calls on stdin, replies on stdout
    python inside.py tests CALLS REPLIES   runs tests.json over these two descriptors; its verdict on stdout

Nothing of ours can be imported here: the sandbox has the standard library alone.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing is a fifth of the time in which Python starts
    from typing import Any

MAX_REPLY = 8 << 20  # bytes
_PARTS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, objects: list[Any] | None = None) -> Any:
    """A plain value as JSON; anything else as its place in `objects`, or TypeError where there is no such list."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(part, objects) for part in value]
    for name, kind in _PARTS.items():
        if isinstance(value, kind):
            return {name: [encode(part, objects) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, objects), encode(part, objects)] for key, part in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Object):
        return {"object": value._place}
    if objects is None:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the program")
    objects.append(value)
    return {"object": len(objects) - 1}


def decode(value: Any, objects: Any) -> Any:
    """What `encode` was given; `objects[place]` for what is not plain."""
    if isinstance(value, list):
        return [decode(part, objects) for part in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name in _PARTS:
        return _PARTS[name](decode(part, objects) for part in content)
    if name == "dict":
        return {decode(key, objects): decode(part, objects) for key, part in content}
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "object":
        return objects[content]
    raise ValueError(name)


class Object:
    """On the tests' side, what the program returned and is no plain value: it equals itself alone."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Object) and other._place == self._place

    __hash__ = None  # type: ignore[assignment]


class _Objects:
    def __getitem__(self, place: int) -> Object:
        return Object(int(place))


class Failed(BaseException):
    """The program can no longer pass: it ended, was late, or replied with what is no value. Not for tests to catch."""


class TestsFault(BaseException):
    """The tests themselves are wrong."""


class Caller:
    """The program, seen from the tests."""

    def __init__(self, calls: int, replies: int, seconds: float) -> None:
        self._calls, self._replies, self._waiting = calls, replies, b""
        self._deadline = time.monotonic() + seconds
        self.count, self.failure = 0, ""

    def function(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                question = [name, encode(arguments), encode(named)]
            except TypeError as error:
                raise TestsFault(str(error)) from None
            try:
                with os.fdopen(os.dup(self._calls), "w") as pipe:
                    pipe.write(json.dumps(question) + "\n")
            except OSError:  # among them the broken pipe of a program that has ended
                self.fail("the program ended before it answered")
            return self.reply()

        call.__name__ = name
        return call

    def reply(self) -> Any:
        """The program's next result; or what it raised, if that is a built-in exception, is raised here too."""
        line = self._line()
        try:
            reply = json.loads(line)
            kind, content = reply
            value = decode(content, _Objects()) if kind == "value" else str(content)
        except (ValueError, TypeError, RecursionError, KeyError, AttributeError):
            self.fail("the program's reply is no value")
        self.count += 1
        if kind == "value":
            return value
        if kind != "raised":
            self.fail(value)
        name, _, message = value.partition(": ")
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, UnicodeError):
            raise known(message)
        raise RuntimeError(value)

    def fail(self, why: str) -> Any:
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
    """The kind of a verdict, and why."""
    program = Caller(calls, replies, task["seconds"])

    def late(*_: object) -> None:
        program.fail("the tests did not end in time on what the program returned")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, task["seconds"] + 0.5)
    namespace: dict[str, Any] = {"__name__": "tests"}
    number = 0
    try:
        try:
            compiled = [compile(text, "tests", "exec") for text in task["tests"]]
            exec(compile(task["given"], "given", "exec"), namespace)
        except Exception as error:
            return "crash", f"the tests cannot be run: {_describe(error)}"
        namespace.update({name: program.function(name) for name in task["names"]})
        program.reply()  # that its own code has run
        program.count = 0
        for code in compiled:
            number += 1
            exec(code, namespace)
    except TestsFault as error:
        return "crash", f"test {number} cannot be run: {error}"
    except NameError as error:
        return "crash", f"test {number} cannot be run: {error}"
    except Failed:
        pass
    except BaseException as error:
        return "wrong", f"test {number} of {len(task['tests'])} failed: {_describe(error)}"
    if program.failure:
        return "wrong", program.failure
    return ("correct", "") if program.count else ("crash", "the tests never call the program")


def answer_calls() -> None:
    """The program's side: run solution.py, then answer call after call."""
    calls, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1):  # what the program prints is no reply
        os.dup2(nowhere, stream)
    objects: list[Any] = []
    namespace: dict[str, Any] = {"__name__": "solution"}

    def reply(kind: str, content: Any) -> None:
        replies.write(json.dumps([kind, content]) + "\n")
        replies.flush()

    try:
        with open("/tmp/solution.py", encoding="utf-8") as file:
            exec(compile(file.read(), "solution.py", "exec"), namespace)
        reply("value", None)
    except BaseException as error:
        reply("failed", f"the program does not run: {_describe(error)}")
        return
    for line in calls:
        name, arguments, named = json.loads(line)
        try:
            value = namespace[name](*decode(arguments, objects), **decode(named, objects))
            reply("value", encode(value, objects))
        except BaseException as error:
            reply("raised", _describe(error))


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
        os.dup2(2, 1)  # tests may print
        kind, detail = run_tests(task, int(sys.argv[2]), int(sys.argv[3]))
        os.write(verdict, json.dumps({"kind": kind, "detail": detail}).encode())
        os._exit(0)
