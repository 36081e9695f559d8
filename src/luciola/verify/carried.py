"""What goes between a program and its tests, in the sandboxes of `inside.py`: plain values, and questions to the rest.

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
from collections import Counter, OrderedDict, deque

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing is a fifth of the time in which Python starts
    from collections.abc import Callable
    from typing import Any

    from luciola.verify.inside import Caller

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


class TestsFault(BaseException):
    """The tests themselves are wrong."""


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
