"""Programming problems of one's own: rows are judged in either language, or refused with their line and field."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from luciola.tasks import Programs, TaskConfig
from luciola.tasks.base import AsksForPrograms, Problem, encoded, stops_of
from luciola.tasks.judge import judge
from luciola.tasks.named import table
from luciola.text.tokenizer import Tokenizer
from luciola.verify import code, sandbox

needs_sandbox = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
SUM = {"prompt": "Print the sum of two numbers.", "pairs": [["1 2\n", "3\n"], ["10 -4\n", "6"]]}
DOUBLE = {"prompt": "Write double(x).", "tests": ["assert double(2) == 4", "assert double('ab') == 'abab'"], "id": 7}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path: Path, row: dict[str, Any]) -> tuple[Programs, Problem]:
    """The task of a file with this row alone, and its problem."""
    file = write(path / "problems.jsonl", [row])
    task = TypeAdapter(TaskConfig).validate_python(table(f"programs={file}"))
    assert isinstance(task, Programs) and (task.size("heldout"), task.size("train")) == (1, 0)
    return task, task.problem("heldout", 0, 0)


def kinds(task: Programs, problem: Problem, completions: list[str]) -> list[str]:
    return [verdict.kind for verdict in judge(task, [problem], [completions])[0]]


@needs_sandbox
@needs_compiler
def test_programs_in_cpp_are_asked_for_and_judged(tmp_path: Path) -> None:
    task, problem = only(tmp_path, {**SUM, "language": "cpp"})
    system, user = task.messages(problem)
    assert "C++" in system["content"] and user["content"] == SUM["prompt"]
    assert problem.categories == (("language", "c++"),)
    program = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a OP b; }"
    completions = [f"<think>hm</think>\n```cpp\n{program.replace('OP', op)}\n```\nOutput:\n```\n3\n```" for op in "+-?"]
    assert kinds(task, problem, completions) == ["correct", "wrong", "wrong"]


@needs_sandbox
@pytest.mark.parametrize(
    ("row", "right"),
    [
        (SUM, "print(sum(map(int, input().split())))"),
        (DOUBLE, "def double(x):\n    return 2 * x"),
        ({**DOUBLE, "tests": "\n".join(DOUBLE["tests"])}, "def double(x):\n    return 2 * x"),  # type: ignore[arg-type]
        ({**DOUBLE, "given": "two = 2", "names": ["double"]}, "def double(x):\n    return two * x"),
    ],
)
def test_programs_in_python_are_judged(tmp_path: Path, row: dict[str, Any], right: str) -> None:
    task, problem = only(tmp_path, row)
    assert "Python" in task.messages(problem)[0]["content"]
    completions = [
        f"```python\n{program}\n```" for program in (right, right.replace("x)", "x, y)").replace("sum", "max"))
    ]
    assert kinds(task, problem, [*completions, ""]) == ["correct", "wrong", "no_answer"]


@needs_sandbox
def test_the_model_is_asked_in_a_conversation(tmp_path: Path) -> None:
    task, problem = only(tmp_path, SUM)
    tokenizer = Tokenizer.characters("".join(sorted(set(json.dumps(task.messages(problem))))))
    assert encoded(tokenizer, task, problem) == tokenizer.chat(task.messages(problem))
    assert isinstance(task, AsksForPrograms) and stops_of(task) == ()
    own = task.model_copy(update={"instruction": "In verse."})
    assert own.messages(problem)[0] == {"role": "system", "content": "In verse."}
    assert len(task.model_copy(update={"instruction": ""}).messages(problem)) == 1


@needs_sandbox
def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    task = Programs(path=write(tmp_path / "many.jsonl", [{**SUM, "prompt": f"Task {n}"} for n in range(200)]))
    prompts = [
        {task.problem(split, i, 0).prompt for i in range(task.size(split) or 0)}  # type: ignore[arg-type]
        for split in ("train", "heldout")
    ]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {f"Task {n}" for n in range(200)}


@needs_sandbox
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row must be a JSON object, such as"),
        ({"pairs": SUM["pairs"]}, "expected text in the field 'prompt'; the row has the fields: pairs"),
        ({**SUM, "prompt": " "}, "the field 'prompt' is empty"),
        ({"prompt": "p"}, "must have `pairs` or `tests`, one of the two; the fields are: prompt"),
        ({**SUM, **DOUBLE}, "must have `pairs` or `tests`, one of the two"),
        ({**SUM, "pairs": []}, "`pairs` is empty"),
        ({**SUM, "pairs": [["1"]]}, r"`pairs` must be a list of \[input, output\]"),
        ({**SUM, "language": "rust"}, "`language` is 'rust'"),
        ({**DOUBLE, "language": "cpp"}, "`tests` are asserts and test Python"),
        ({**DOUBLE, "tests": ["assert double("]}, "the tests are no Python"),
        ({**DOUBLE, "tests": ["assert 1"]}, "`tests` take no name from the program"),
        ({**DOUBLE, "tests": [3]}, "`tests` must be a text or a list of texts"),
    ],
)
def test_mistakes_name_the_file_the_line_and_the_field(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 2: .*{message}"):
        Programs(path=write(tmp_path / "problems.jsonl", [SUM, row])).size("train")


def test_what_is_missing_on_the_machine_is_said_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "")
    monkeypatch.setattr(code, "without_compiler", lambda: "install g++")
    python = Programs(path=write(tmp_path / "python.jsonl", [SUM]))
    cpp = Programs(path=write(tmp_path / "cpp.jsonl", [{**SUM, "language": "cpp"}]))
    assert (python.size("train") or 0) + (python.size("heldout") or 0) == 1
    for task in (python, cpp):
        with pytest.raises(sandbox.SandboxError, match=r"install (g\+\+|bubblewrap)"):
            for split in ("train", "heldout"):
                task.size(split)  # type: ignore[arg-type]
            monkeypatch.setattr(sandbox, "unavailable", lambda: "install bubblewrap")
            task.size("train")
