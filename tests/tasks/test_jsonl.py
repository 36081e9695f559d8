"""Files of problems: rows are found, told apart and refused with their number."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luciola.tasks import Jsonl
from luciola.tasks.base import R1_INSTRUCTION


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def gsm(tmp_path: Path) -> Jsonl:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n:,}"} for n in range(600)]
    return Jsonl(path=write(tmp_path / "gsm.jsonl", rows), answer_after="####")


def test_rows_become_problems(gsm: Jsonl) -> None:
    problem = gsm.problem("train", 0, seed=0)
    n = int(problem.prompt.split()[2])
    assert (problem.prompt, problem.truth) == (f"What is {n} + {n}?", f"{2 * n:,}")
    assert gsm.messages(problem) == [
        {"role": "system", "content": R1_INSTRUCTION},
        {"role": "user", "content": problem.prompt},
    ]
    assert gsm.grade(problem, f"<think>easy</think><answer>{2 * n}</answer>").kind == "correct"
    assert gsm.grade(problem, f"<think>easy</think><answer>{2 * n + 1}</answer>").kind == "wrong"


def test_each_pass_is_a_new_order_of_all_rows(gsm: Jsonl) -> None:
    size = gsm.size("train")
    assert size is not None
    first = [gsm.problem("train", index, 0).key for index in range(size)]
    second = [gsm.problem("train", size + index, 0).key for index in range(size)]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == size
    assert first != second
    assert [gsm.problem("train", index, 1).key for index in range(size)] != first


def test_splits_are_disjoint_and_complete(gsm: Jsonl) -> None:
    train, heldout = gsm.size("train") or 0, gsm.size("heldout") or 0
    assert train + heldout == 600
    assert 30 < heldout < 90
    keys = {
        split: {gsm.problem(split, i, 0).key for i in range(gsm.size(split) or 0)} for split in ("train", "heldout")
    }  # type: ignore[arg-type]
    assert not keys["train"] & keys["heldout"]


def test_a_question_asked_twice_stays_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}{'  ' * copy} ?", "answer": str(n)} for n in range(50) for copy in (0, 1)]
    task = Jsonl(path=write(tmp_path / "twice.jsonl", rows), held_out_fraction=0.5)
    for split in ("train", "heldout"):
        keys = [task.problem(split, i, 0).key for i in range(task.size(split) or 0)]  # type: ignore[arg-type]
        assert all(keys.count(key) == 2 for key in keys)


def test_a_heldout_file_is_left_out_of_training(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"question": f"q{n}", "answer": str(n)} for n in range(10)])
    heldout = write(tmp_path / "test.jsonl", [{"question": f"q{n}", "answer": str(n)} for n in range(7, 12)])
    task = Jsonl(path=path, heldout_path=heldout)
    assert {task.problem("train", i, 0).truth for i in range(7)} == set("0123456")
    assert {task.problem("heldout", i, 0).truth for i in range(5)} == {"7", "8", "9", "10", "11"}
    assert (task.size("train"), task.size("heldout")) == (7, 5)


def test_boxed_answers_and_other_fields(tmp_path: Path) -> None:
    row = {"problem": "Half?", "solution": "First \\boxed{2}, so $\\boxed{\\frac{1}{2}}$.", "level": 5}
    task = Jsonl(
        path=write(tmp_path / "math.jsonl", [row]),
        question="problem",
        answer="solution",
        answer_boxed=True,
        held_out_fraction=0.001,
    )
    problem = task.problem("train", 0, 0)
    assert (problem.prompt, problem.truth) == ("Half?", "\\frac{1}{2}")
    assert task.grade(problem, "<think>a</think>\\boxed{0.5}").kind == "correct"


def test_numbers_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": 4}\r\n\n{"question": "b", "answer": 2.5}\n')
    task = Jsonl(path=path, held_out_fraction=0.001)
    assert {task.problem("train", i, 0).truth for i in range(2)} == {"4", "2.5"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": "1"}])
    task = Jsonl(path=path, held_out_fraction=0.001)
    assert task.size("train") == 1
    write(path, [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}])
    assert task.size("train") == 2


GOOD: dict[str, object] = {"question": "a", "answer": "x #### 1"}


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, "has no rows"),
        (["\n\n"], {}, "has no rows"),
        ([GOOD, "{broken\n"], {}, "line 2: "),
        ([GOOD, "[1, 2]\n"], {}, "line 2: a row must be a JSON object"),
        (
            [GOOD, {"question": "b"}],
            {},
            "line 2: expected text in the field 'answer'; the row has the fields: question",
        ),
        ([{}], {}, "line 1: expected text in the field 'question'; the row has the fields: none"),
        ([{"question": "b", "answer": None}], {}, "line 1: expected text in the field 'answer'"),
        ([{"question": "b", "answer": True}], {}, "line 1: expected text in the field 'answer'"),
        ([{"question": " ", "answer": "1"}], {}, "line 1: the field 'question' is empty"),
        ([GOOD], {"question": "problem"}, "'problem'; the row has the fields: question, answer"),
        (
            [GOOD, {"question": "b", "answer": "1"}],
            {"answer_after": "####"},
            "line 2: the field 'answer' does not contain answer_after = '####'",
        ),
        (
            [{"question": "b", "answer": "1 ####"}],
            {"answer_after": "####"},
            "line 1: the field 'answer' holds no answer",
        ),
        ([GOOD], {"answer_boxed": True}, "line 1: the field 'answer' has no .*, which answer_boxed = true asks for"),
    ],
)
def test_mistakes_in_files_name_the_row(tmp_path: Path, rows: list[Any], fields: dict[str, Any], message: str) -> None:
    task = Jsonl(path=write(tmp_path / "bad.jsonl", rows), **fields)
    with pytest.raises(ValueError, match=message) as caught:
        task.problem("train", 0, 0)
    assert "bad.jsonl" in str(caught.value)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file nowhere\.jsonl; set task\.path"):
        Jsonl(path=Path("nowhere.jsonl")).size("train")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: 'utf-8' codec"):
        Jsonl(path=latin).size("train")
    one = Jsonl(path=write(tmp_path / "one.jsonl", [{"question": "a", "answer": "1"}]), held_out_fraction=0.001)
    with pytest.raises(ValueError, match=r"heldout split of .* is empty"):
        one.problem("heldout", 0, 0)
    with pytest.raises(ValueError, match="no worked solutions"):
        one.solution(one.problem("train", 0, 0), random.Random(0))
    with pytest.raises(ValidationError, match="two ways to find the answer"):
        Jsonl(path=latin, answer_after="####", answer_boxed=True)


@pytest.mark.parametrize(
    ("name", "fields", "rows"),
    [
        ("gsm8k_train.jsonl", {"answer_after": "####"}, 7473),
        ("math_sample.jsonl", {"question": "problem", "answer": "solution", "answer_boxed": True}, 1000),
    ],
)
def test_real_files(name: str, fields: dict[str, Any], rows: int) -> None:
    folder = os.environ.get("LUCIOLA_DATA")
    if not folder:
        pytest.skip("set LUCIOLA_DATA to a folder with gsm8k_train.jsonl and math_sample.jsonl")
    task = Jsonl(path=Path(folder) / name, **fields)
    train, heldout = task.size("train") or 0, task.size("heldout") or 0
    assert train + heldout == rows
    assert heldout / rows == pytest.approx(0.1, abs=0.03)
    for index in range(100):
        problem = task.problem("heldout", index, 0)
        assert task.grade(problem, f"<think>a</think><answer>{problem.truth}</answer>").kind == "correct"
