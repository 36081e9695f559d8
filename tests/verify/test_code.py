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
    ],
)
def test_which_text_is_the_program(completion: str, program: str | None) -> None:
    assert code.extract(completion) == program


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


@needs_sandbox
def test_faults_of_the_tests_are_no_fault_of_the_program() -> None:
    assert kind("def double(x):\n    return 2 * x", Asserts(("assert double(2) ==",), ("double",)))[0] == "crash"
    assert (
        kind("def double(x):\n    return 2 * x", Asserts(("assert 1",), ("double",)))[0] == "crash"
    )  # it is not called


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
def test_many_keep_their_order() -> None:
    programs = [f"```python\ndef double(x):\n    return {n} * x\n```" for n in (2, 3, 2, 1)]
    kinds = [verdict.kind for verdict in code.grade_many([(program, DOUBLE) for program in programs])]
    assert kinds == ["correct", "wrong", "correct", "wrong"]


def test_tests_are_read_from_text() -> None:
    assert read_tests("assert f(1) == 2\nassert g() == 3") == Asserts(
        ("assert f(1) == 2", "assert g() == 3"), ("f", "g")
    )
    assert read_tests(json.dumps({"pairs": [["1", "2"]], "language": "c++"})) == Pairs((("1", "2"),), "c++")
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
    ],
)
def test_tests_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(text)
