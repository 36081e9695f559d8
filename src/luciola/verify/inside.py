"""What runs inside the sandboxes of `code.py`: a program that answers calls, and the tests that make them.

The program and its tests are two processes in two sandboxes, joined by two pipes. Nothing but plain values goes
through, as lines of JSON: arguments one way, results the other. So the program never meets an expected result, nor the
code that compares: it cannot read, patch, or leave them, and an object that says it equals everything does not get
across. A program that writes the replies by hand has gained nothing, since it has to know the right results.

    python inside.py program               answers calls of solution.py's functions: calls on stdin, replies on stdout
    python inside.py tests CALLS REPLIES   runs tests.json over these two descriptors; its verdict on stdout

| what                                                | how it is carried                                              |
| --------------------------------------------------- | -------------------------------------------------------------- |
| numbers, text, bytes, lists, tuples, dicts, sets,   | as a copy                                                      |
| deques, ranges, Fraction, Decimal, dates and times  |                                                                |
| arguments that a function has changed               | back, if it returned None: what it returns is judged against   |
|                                                     | the arguments as they were                                     |
| an exception                                        | as the same built-in one, or as one of its name below that;    |
|                                                     | what would end a loop of the tests is a RuntimeError           |
| any other result (generators, instances, functions) | as an `Object`: it stays with the program, and is asked        |
| any other argument (functions, the tests' classes)  | not at all: the tests are at fault ("crash")                   |

Nothing of ours can be imported here: the sandbox has the standard library alone.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import select
import signal
import sys
import time
from collections import Counter, OrderedDict, deque

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing is a fifth of the time in which Python starts
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_REPLY = 8 << 20  # bytes
# What a value may grow to as the tests use it, where that is C code, which no alarm interrupts.
MAX_ITEMS, MAX_HEX, MAX_EXPONENT = 1_000_000, 1 << 18, 10_000

_PARTS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_DICTS: dict[str, Any] = {"Counter": Counter, "OrderedDict": OrderedDict, "dict": dict}
_TEXTS = {"Decimal": "decimal", "date": "datetime", "datetime": "datetime", "time": "datetime"}
_NUMBERS: dict[str, tuple[str, tuple[str, ...]]] = {  # name: module, and the attributes that it is made of
    "Fraction": ("fractions", ("numerator", "denominator")),
    "complex": ("builtins", ("real", "imag")),
    "range": ("builtins", ("start", "stop", "step")),
    "slice": ("builtins", ("start", "stop", "step")),
    "timedelta": ("datetime", ("days", "seconds", "microseconds")),
}


def encode(value: Any, objects: Objects | None = None) -> Any:
    """A plain value as JSON; anything else as its place in `objects`, or TestsFault where there are none."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):  # a long one in hexadecimal, which takes linear time and has no limit
        return value if value.bit_length() < 10_000 else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(part, objects) for part in value]
    for name, kind in _PARTS.items():
        if isinstance(value, kind):
            return {name: [encode(part, objects) for part in value]}
    for name, kind in _DICTS.items():
        if isinstance(value, kind):
            return {name: [[encode(key, objects), encode(part, objects)] for key, part in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    module, name = type(value).__module__, type(value).__name__
    if _TEXTS.get(name) == module:
        return {name: str(value)}
    if name in _NUMBERS and _NUMBERS[name][0] == module:
        return {name: [encode(getattr(value, part)) for part in _NUMBERS[name][1]]}
    if isinstance(value, type) and issubclass(value, BaseException):
        return {"exception": [kind.__name__ for kind in value.__mro__]}
    if isinstance(value, Object):
        return {"object": value._place}
    if objects is not None:
        return {"object": objects.place(value)}
    raise TestsFault(f"a {name} cannot be handed to the program")


def decode(value: Any, objects: Objects | Caller) -> Any:
    """What `encode` was given; any exception where it is not what `encode` returns."""
    if isinstance(value, list):
        return [decode(part, objects) for part in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "int" and len(content) <= MAX_HEX:
        return int(content, 16)
    if name in _PARTS:
        return _PARTS[name](decode(part, objects) for part in content)
    if name in _DICTS:
        return _DICTS[name]({decode(key, objects): decode(part, objects) for key, part in content})
    if name in ("bytes", "bytearray"):
        return getattr(builtins, name).fromhex(content)
    if name in _TEXTS:
        kind = getattr(importlib.import_module(_TEXTS[name]), name)
        read = getattr(kind, "fromisoformat", kind)(str(content))
        if name != "Decimal" or abs(read.adjusted()) <= MAX_EXPONENT:
            return read
    if name in _NUMBERS:
        numbers = [decode(part, objects) for part in content]
        if all(type(number) in (int, float, type(None)) for number in numbers):
            made = getattr(importlib.import_module(_NUMBERS[name][0]), name)(*numbers)
            if name != "range" or len(made) <= MAX_ITEMS:
                return made
    if name == "exception":
        return objects.exception(content)
    if name == "object":
        return objects.object(int(content))
    raise ValueError(f"a {name} out of bounds")


class Objects:
    """On the program's side, what the tests know by its place; place 0 is the program's module."""

    def __init__(self, module: object) -> None:
        self._all, self._places = [module], {id(module): 0}

    def place(self, value: object) -> int:
        place = self._places.setdefault(id(value), len(self._all))
        if place == len(self._all):
            self._all.append(value)  # which also keeps its id from being another's
        return place

    def object(self, place: int) -> object:
        return self._all[place]

    def exception(self, names: list[str]) -> Any:
        return getattr(builtins, names[0])


class Object:
    """On the tests' side, what the program returned and is no plain value. What it is asked, the program answers.

    So it may be asked nothing that holds an expected result: not `result - 3.5`, nor `result.startswith("a")`, to which
    a cheat would answer what it likes. It is unequal to every plain value; and plain values are in a question (calls
    and [] apart) only for objects that the tests made themselves, by calling a class of the program: operators for what
    the call returned, methods also where the program returns such an object once more.
    """

    def __init__(self, program: Caller, place: int, fresh: bool = False) -> None:
        own = {"_program": program, "_place": place, "_owner": None, "_fresh": fresh, "_makes": False}
        self.__dict__.update(own)  # past __setattr__

    def _only(self, allowed: bool, *values: object) -> None:
        if not allowed and not all(isinstance(value, Object) for value in values):
            self._program.fail("the program returned an object where the tests work with a plain value")

    def _made(self) -> bool:
        return self._fresh or self._place in self._program.made

    def _demanded(self) -> bool:
        """Whether the tests call this of their own accord: a name, or a method of what they made."""
        return self._makes or (self._owner is not None and self._owner._made())

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._only(self._owner is None or self._demanded(), *arguments, *named.values())
        result = self._program.ask("call", (self, *arguments), named)
        if self._makes and isinstance(result, Object):
            self._program.made.add(result._place)
            result.__dict__["_fresh"] = True
        return result

    def __getattr__(self, name: str) -> Any:
        value = self._program.ask("getattr", (self, name))
        if isinstance(value, Object):
            value.__dict__["_owner"] = self
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        self._only(self._made(), value)
        self._program.ask("setattr", (self, name, value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Object):
            return False
        return other._place == self._place or bool(self._program.ask("__eq__", (self, other)))

    def __iter__(self) -> Any:
        return self._program.ask("__iter__", (self,))

    def __contains__(self, value: object) -> bool:
        if self._fresh or isinstance(value, Object):
            return bool(self._program.ask("__contains__", (self, value)))
        return any(part == value for part in self)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Object) and bool(self._program.ask("isinstance", (value, self)))


def _operator(name: str, given: bool, reflected: bool = False) -> Callable[..., Any]:
    def ask(self: Object, *arguments: Any) -> Any:
        self._only(not given or self._fresh, *arguments)
        return self._program.ask(name, (*arguments, self) if reflected else (self, *arguments))

    return ask


for _name in (
    *("bool", "len", "next", "reversed", "str", "repr", "hash", "int", "float", "complex", "index", "round"),
    *("abs", "neg", "pos", "invert", "getitem"),
):
    setattr(Object, f"__{_name}__", _operator(f"__{_name}__", given=False))
for _name in ("lt", "le", "gt", "ge", "setitem", "delitem"):
    setattr(Object, f"__{_name}__", _operator(f"__{_name}__", given=True))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Object, f"__{_name}__", _operator(f"__{_name}__", given=True))
    setattr(Object, f"__r{_name}__", _operator(f"__{_name}__", given=True, reflected=True))


class Failed(BaseException):
    """The program can no longer pass: it ended, was late, or replied with what is no value. Not for tests to catch."""


class TestsFault(BaseException):
    """The tests themselves are wrong."""


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
