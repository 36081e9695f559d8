"""Programs against tests: what is taken for the program, both kinds of tests, both languages, and whose fault it is."""

import json
import shutil

import pytest

from luciola.verify import code, sandbox
from luciola.verify.code import Asserts, Pairs, read_tests

needs_sandbox = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
DOUBLE = Asserts(("assert double(2) == 4", "assert double('ab') == 'abab'"))
ADD = Pairs((("1 2\n", "3\n"), ("10 -4\n", "6")))
ADD_CPP = Pairs(ADD.pairs, "c++")


def kind(program: str, tests: code.Tests, language: str = "python", **limits: float) -> tuple[str, str]:
    verdict = code.grade(f"<think>hm</think>\n```{language}\n{program}\n```", tests, **limits)  # type: ignore[arg-type]
    assert verdict.reward == float(verdict.kind == "correct")
    return verdict.kind, verdict.detail


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("a = 1", "a = 1"),
        ("<think>```python\nno\n```</think>\na = 1", "\na = 1"),
        ("```python\nfirst\n```\nbetter:\n```python\nlast\n```\nDone.", "last\n"),
        ("```\nplain\n```", "plain\n"),
        ("```python\nnever closed", None),
        ("<think>```python\na = 1\n```", None),
        ("<think>a</think>  ", None),
        ("", None),
        ("~~~python\na = 1\n~~~", "a = 1\n"),
        ('````python\ntext = """\n```\n"""\n````', 'text = """\n```\n"""\n'),
        ("1. So:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        ("```python\nprogram\n```\nExample output:\n```\n3\n```", "program\n"),
        ("```\nprogram\n```\nExample output:\n```text\n3\n```", "program\n"),
        ("```python\nprogram\n```\nIn C++:\n```cpp\nother\n```", "program\n"),
        ("```cpp\nfirst\n```\n```text\nlast\n```", "last\n"),
        ("<think>no</think><answer>a = 1</answer>", "a = 1"),
        ("<think>no</think><answer>\n```python\na = 1\n```\n</answer>", "a = 1\n"),
        ("<think>no</think><answer> </answer>", None),
        ("```python\nprogram\n```\n```python\ncut o", None),
    ],
)
def test_which_text_is_the_program(completion: str, program: str | None) -> None:
    assert code.extract(completion) == program


def test_a_block_in_the_language_of_the_tests_is_the_program() -> None:
    both = "```cpp\nint main() {}\n```\n```python\npass\n```"
    assert (code.extract(both, "c++"), code.extract(both)) == ("int main() {}\n", "pass\n")


@needs_sandbox
def test_an_indented_program_is_one_and_a_body_keeps_its_indentation() -> None:
    assert kind("    def double(x):\n        return 2 * x", DOUBLE) == ("correct", "")
    body = Asserts(("assert double(2) == 4",), ("double",), 'def double(x):\n    """Twice x."""\n')
    assert kind("    return 2 * x", body) == ("correct", "")
    assert kind("    return 3 * x", body)[0] == "wrong"


@needs_sandbox
def test_asserts() -> None:
    assert kind("def double(x):\n    return 2 * x", DOUBLE) == ("correct", "")
    assert kind("def double(x):\n    return x + 2", DOUBLE)[0] == "wrong"
    assert kind("def triple(x):\n    return 3 * x", DOUBLE)[0] == "wrong"
    assert kind("def double(x:", DOUBLE)[0] == "wrong"
    assert code.grade("", DOUBLE).kind == "no_answer"
    slow = kind("def double(x):\n    while True: pass", DOUBLE, seconds=1)
    assert slow[0] == "wrong" and "time" in slow[1]


@needs_sandbox
def test_values_of_every_plain_kind_come_through() -> None:
    value = "[1, 2.5, None, True, 'é', b'x', (1, (2,)), {3}, frozenset({4}), {(1, 2): [5]}, 1j]"
    assert kind("def same(x):\n    return x", Asserts((f"assert same({value}) == {value}",))) == ("correct", "")
    raising = Asserts(
        ("try:\n    bad()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert 0",)
    )
    assert kind("def bad():\n    raise ValueError('no')", raising) == ("correct", "")
    assert kind("def bad():\n    return 1", raising)[0] == "wrong"


NUMBERS = """
from collections import Counter, OrderedDict, deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import factorial
"""


@needs_sandbox
def test_values_of_the_standard_library_come_through() -> None:
    value = (
        "[Fraction(1, 3), Decimal('1.50'), date(2020, 1, 2), datetime(2020, 1, 2, 3, 4, 5, 6, timezone.utc), "
        "time(1, 2), timedelta(-1, 5), range(1, 9, 2), deque([1]), Counter('aab'), OrderedDict(a=1), bytearray(b'x'), "
        "factorial(2000)]"
    )
    tests = (
        f"value = {value}\nassert same(value) == value == made()",
        "assert [type(part) for part in value] == [type(part) for part in made()]",
    )
    program = f"def same(x):\n    return x\ndef made():\n    return {value}"
    assert kind(program, Asserts(tests, given=NUMBERS)) == ("correct", "")
    assert kind(program.replace("2000", "2001"), Asserts(tests, given=NUMBERS))[0] == "wrong"


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and sum(f(4)) == 6 and 2 in f(3)"),
        ("def f(n):\n    while True:\n        yield n", "items = f(2)\nassert [next(items), next(items)] == [2, 2]"),
        ("def f(n):\n    return map(str, range(n))", "assert list(f(2)) == ['0', '1']"),
        ("def f(d):\n    return d.keys()", "assert sorted(f({2: 1, 1: 1})) == [1, 2] and len(f({})) == 0"),
        ("def f(a):\n    return lambda b: a + b", "assert f(1)(2) == 3"),
        ("def f(a):\n    a.remove(2)", "a = [1, 2, 3]\nf(a)\nassert a == [1, 3]"),
        ("def f(*, a):\n    a['x'] = [1]", "a = {}\nf(a=a)\nassert a == {'x': [1]}"),
        ("LIMIT = 10", "assert LIMIT == 10"),
        ("class f:\n    def __getitem__(self, i):\n        return 'abc'[i]", "assert f()[1:] == 'bc'"),
        ("import json\nf = json.loads", "try:\n    f('{')\nexcept ValueError:\n    pass\nelse:\n    assert 0"),
        ("f = {}.__getitem__", "try:\n    f('a')\nexcept KeyError as e:\n    assert e.args == ('a',)\nelse:\n    0/0"),
        (
            "def f(b):\n    return b.decode()",
            "try:\n    f(b'\\xff')\nexcept UnicodeDecodeError as e:\n    assert e.start == 0\nelse:\n    0/0",
        ),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass P:\n    x: int\ndef f():\n    return P(3)",
            "assert f().x == 3",
        ),
    ],
)  # fmt: skip
def test_what_honest_programs_do(program: str, test: str) -> None:
    assert kind(program, Asserts((test,))) == ("correct", "")


@needs_sandbox
def test_a_program_has_a_beginning_of_its_own_behind_what_is_given() -> None:
    tests = Asserts(("assert f(4) == 2",), given="import math")
    assert kind("from __future__ import annotations\ndef f(x):\n    return math.sqrt(x)", tests) == ("correct", "")


STACK = """
from dataclasses import dataclass, field

class Empty(LookupError):
    pass

@dataclass
class Stack:
    items: list = field(default_factory=list)
    name = "stack"

    @classmethod
    def of(cls, *items):
        return cls(list(items))

    def push(self, item):
        self.items.append(item)
        return self

    def pop(self):
        if not self.items:
            raise Empty("nothing there")
        return self.items.pop()

    def __len__(self):
        return len(self.items)

    def __contains__(self, item):
        return item in self.items

    def __mul__(self, times):
        return Stack(self.items * times)
"""


@needs_sandbox
def test_tests_of_a_class() -> None:
    tests = (
        "stack = Stack()\nassert not stack and Stack.name == 'stack' and isinstance(stack, Stack)",
        "assert stack.push(1).push(2).push(3).pop() == 3 and len(stack) == 2 and stack.items == [1, 2]",
        "assert 1 in stack and 3 not in stack and not hasattr(stack, 'size')",
        "assert stack == Stack.of(1, 2) and stack != Stack.of(2) and (stack * 2).items == [1, 2, 1, 2]",
        "stack.items = []\nfor error in (Empty, LookupError):\n    try:\n        stack.pop()\n"
        "    except error as raised:\n        assert str(raised) == 'nothing there'\n    else:\n        assert 0",
    )
    assert kind(STACK, Asserts(tests)) == ("correct", "")
    for right, wrong in (("pop()", "pop(0)"), ("(LookupError)", "(Exception)"), ("items * times", "items")):
        assert kind(STACK.replace(right, wrong), Asserts(tests))[0] == "wrong"


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(a):\n    a.clear()\n    return []", "a = [2, 1]\nassert f(a) == sorted(a)"),
        ("def f(a):\n    a.clear()\n    return 0", "a = [2, 1]\nassert f(a) == sum(a)"),
        ("class Disc:\n    def area(self): return self\n    def __sub__(self, n): return 0",
         "assert abs(Disc().area() - 12.56) < 0.1"),
        ("class T:\n    def startswith(self, text): return True\nclass Disc:\n    name = T()",
         "assert Disc().name.startswith('d')"),
        ("class Disc:\n    def __eq__(self, n): return True", "assert Disc() == 3"),
    ],
)  # fmt: skip
def test_objects_and_arguments_do_not_help_a_cheat(program: str, test: str) -> None:
    assert kind(program, Asserts((test,)))[0] == "wrong"


@needs_sandbox
@pytest.mark.parametrize(
    ("test", "names", "why"),
    [
        ("assert double(2) == four", ("double",), "test 1 cannot be run: name 'four' is not defined"),
        ("assert 1", ("double",), "the tests never call the program"),
        ("assert double(lambda: 1)", (), "test 1 cannot be run: a function cannot be handed to the program"),
        ("class A: pass\nassert double(A())", (), "test 1 cannot be run: a A cannot be handed to the program"),
    ],
)
def test_faults_of_the_tests_are_no_fault_of_the_program(test: str, names: tuple[str, ...], why: str) -> None:
    for program in ("def double(x):\n    return 2 * x", "def double(x):\n    return four"):
        found = kind(program, Asserts((test,), names))
        assert found == ("crash", why) or (names and "four" in program and found[0] == "wrong")
    assert kind("double = 1", Asserts(("assert 1",), ("double",)))[0] == "crash"


@needs_sandbox
@pytest.mark.parametrize("program", ["return math.pi", "raise NameError", "x = y\n    y = x", "return []"])
def test_a_name_that_the_program_misses_is_its_own_fault(program: str) -> None:
    tests = ("for item in double(2):\n    pass\nassert item == 4",)  # without an item, that name is missing, too
    assert kind(f"def double(x):\n    {program}", Asserts(tests))[0] == "wrong"
    assert kind("def single(x):\n    return x", Asserts(tests))[0] == "wrong"


@needs_sandbox
def test_pairs() -> None:
    add = "print(sum(map(int, input().split())))"
    assert kind(add, ADD) == ("correct", "")
    assert kind(f"{add}\nprint()", ADD)[0] == "correct"  # blanks at the end are free
    assert kind("print(3)", ADD) == ("wrong", "test 2 of 2: not the expected output")
    assert kind(f"{add}\nraise SystemExit(1)", ADD) == ("wrong", "test 1 of 2: exit code 1")
    assert "did not end within 0.5 seconds" in kind("while True: pass", ADD, seconds=0.5)[1]
    assert "wrote more" in kind("while True: print('x' * 9999)", ADD)[1]
    assert "ValueError: oh" in kind("raise ValueError('oh')", ADD)[1]


@needs_sandbox
@needs_compiler
def test_cpp() -> None:
    program = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a OP b << std::endl; }"
    assert kind(program.replace("OP", "+"), ADD_CPP, "cpp") == ("correct", "")
    assert kind(program.replace("OP", "-"), ADD_CPP, "cpp") == ("wrong", "test 1 of 2: not the expected output")
    assert kind(program.replace("OP", "?"), ADD_CPP, "cpp") == ("wrong", "the program does not compile")


@needs_sandbox
@needs_compiler
def test_cpp_may_recurse_deep_and_still_have_threads() -> None:
    program = """
    #include <iostream>
    #include <thread>
    #include <vector>
    int depth(int n) { volatile int place[8]; place[n % 8] = n; return n ? depth(n - 1) + place[n % 8] - n + 1 : 0; }
    int main() {
        int n;
        std::cin >> n;
        std::vector<std::thread> threads;
        for (int i = 0; i < 8; i++) threads.emplace_back([] {});
        for (auto &thread : threads) thread.join();
        std::cout << depth(n) << std::endl;
    }"""
    assert kind(program, Pairs((("500000", "500000"),), "c++"), "cpp") == ("correct", "")


@needs_sandbox
def test_many_keep_their_order() -> None:
    programs = [f"```python\ndef double(x):\n    return {n} * x\n```" for n in (2, 3, 2, 1)]
    kinds = [verdict.kind for verdict in code.grade_many([(program, DOUBLE) for program in programs])]
    assert kinds == ["correct", "wrong", "correct", "wrong"]


def test_names_are_those_that_tests_take_from_the_program() -> None:
    test = (
        "from math import pi\ntry:\n    x = [f(i) for i in range(3)]\nexcept E as error:\n    g(error, lambda y: y, pi)"
    )
    assert Asserts((test,)).names == ("E", "f", "g")
    assert Asserts((test,)).classes == ("E",)
    assert Asserts((test,), classes=()).classes == ()


def test_tests_are_read_from_text() -> None:
    assert read_tests("assert f(1) == 2\nassert g() == 3") == Asserts(
        ("assert f(1) == 2", "assert g() == 3"), ("f", "g")
    )
    assert read_tests(json.dumps({"pairs": [["1", "2"]], "language": "c++"})) == Pairs((("1", "2"),), "c++")
    assert read_tests('{"tests": "assert f(1) == 2"}') == Asserts(("assert f(1) == 2",), ("f",))
    assert read_tests('{"pairs": [[1, 2]], "language": "cpp"}') == Pairs((("1", "2"),), "c++")
    assert read_tests(json.dumps({"tests": ["assert f(x)"], "given": "x = 1", "names": ["f"]})) == Asserts(
        ("assert f(x)",), ("f",), "x = 1"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("assert f(", "neither a JSON object nor Python"),
        ('{"test": []}', "must have `pairs` or `tests`"),
        ('{"pairs": []}', "`pairs` is empty"),
        ('{"tests": []}', "`tests` is empty"),
        ('{"pairs": [["1", "2"]], "language": "cobol"}', "`language` is 'cobol'"),
        ("{", "must have `pairs` or `tests`"),
        ('{"tests": ["assert f("]}', r"the tests are no Python \(line 1"),
        ('{"tests": 3}', "`tests` must be a text or a list of texts"),
        ('{"tests": [""]}', "`tests` must be a text or a list of texts, none of them empty"),
        ('{"tests": "assert f(1)", "pairs": []}', "must have `pairs` or `tests`, one of the two"),
        ('{"tests": "assert f(1)", "given": []}', "`given` must be a text"),
        ('{"tests": "assert f(1)", "name": "f"}', "unknown field 'name'; known are classes, given"),
        ('{"tests": "assert f(1)", "language": "cpp"}', "a program in 'c\\+\\+' is tested by `pairs`"),
        ('{"pairs": [["1"]]}', r"`pairs` must be a list of \[input, output\]"),
        ('{"pairs": "1 2"}', r"`pairs` must be a list of \[input, output\]"),
    ],
)
def test_tests_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(text)
