"""Reasoning Gym: its problems are the same in every process and split as ours are; its scorers pay answers only."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from luciola.tasks.base import Problem
from luciola.tasks.reasoning_gym import MEMORY_MB, WORKER, ReasoningGym, names
from luciola.verify.pool import Pool

LIGHT = ("chain_sum", "leg_counting", "spell_backward")

ALL_PROBLEMS = """
import json, sys
from luciola.tasks.reasoning_gym import ReasoningGym, names
every = [(ReasoningGym(), index) for index in range(len(names()))]
for task, index in every + [(ReasoningGym(tasks=sys.argv[1:]), index) for index in range(15)]:
    problem = task.problem("train", index, 3)
    print(json.dumps([problem.prompt, problem.truth, problem.key, problem.source]))
"""
OF_SETS = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")

# Texts that say nothing about any problem, and short ones that are right only where they are the answer.
NONSENSE = (
    "qq", "?", ".", "'", "{}", "[]", "()", "[[]]", "[{}]", "[null]", '{"a": 1}', "[1, 2", "\\boxed{", "null", "None",
    "nan", "NaN", "[NaN]", "nan+nanj", "inf", "-inf", "1e999", "9" * 400, "1/0", "I do not know", "the answer is 42",
    "0", "1", "3", "7", "0.0", "1e-400", "(0, 0)", "0 0 0", "[[0]]", "yes", "no", "True", "False", "A", "x", "é😀",
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(size=1, seconds=60, memory_mb=MEMORY_MB, program=WORKER) as started:
        yield started


def same(answer: str, truth: str) -> bool:
    """Whether two short answers are one, as texts or as numbers; `0 + C` is answered by 0."""
    if answer.casefold() == truth.casefold():
        return True
    try:
        return abs(float(answer) - float(truth.removesuffix(" + C"))) < 1e-4
    except ValueError:
        return False


def test_problems_are_a_function_of_their_place_and_splits_are_disjoint() -> None:
    task = ReasoningGym(tasks=(*LIGHT, "list_functions"))  # whose examples come from a generator of the whole process
    train, held = ([task.problem(split, i, 3) for i in range(12)] for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert train == [task.problem("train", i, 3) for i in range(12)]
    assert not {p.key for p in train} & {p.key for p in held}
    assert [p.categories[0][1] for p in held[:3]] == list(LIGHT)


def test_problems_of_every_task_are_the_same_whatever_the_hash_seed_of_the_process() -> None:
    """Several of them iterate over sets of texts, and the grader is another process than the trainer."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_PROBLEMS, *OF_SETS],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
        )
        for hash_seed in ("1", "2")
    ]
    one, other = ([json.loads(line) for line in process.communicate()[0].splitlines()] for process in running)
    assert len(one) == len(names()) + 15
    assert one == other


def test_every_task_pays_its_own_answer_and_no_nonsense(pool: Pool) -> None:
    paid, unpaid, failed = [], [], []
    for name in names():
        truth = pool.ask("write", name, {}, 11)["answer"]
        answers = NONSENSE if truth is None else (*NONSENSE, truth.strip()[:1])
        if truth is not None and pool.check("score", name, {}, 11, truth.strip()).kind != "correct":
            unpaid.append(name)
        for answer in answers:
            kind = pool.check("score", name, {}, 11, answer).kind
            if kind == "correct" and not same(answer, truth or ""):
                paid.append((name, answer[:40], truth))
            elif kind in ("timeout", "crash"):
                failed.append((name, answer[:40]))
    assert (paid, unpaid, failed) == ([], [], [])


@pytest.mark.parametrize("name", LIGHT)
def test_the_oracle_is_right_and_another_answer_is_not(name: str) -> None:
    task = ReasoningGym(tasks=(name,))
    problem = task.problem("train", 0, 0)
    assert task.grade(problem, f"<think>hm</think><answer>{problem.truth}</answer>").kind == "correct"
    assert task.grade(problem, "<answer>qq</answer>").kind == "wrong"
    assert task.grade(problem, f"<think>{problem.truth}</think>").kind == "no_answer"


@pytest.mark.parametrize("name", ["letter_jumble", "spell_backward", "word_sorting"])
def test_what_is_written_after_the_answer_counts(pool: Pool, name: str) -> None:
    truth = pool.ask("write", name, {}, 11)["answer"]
    given = (truth, truth.replace(", ", ","), f"{truth}, qq", truth + "x")
    assert [pool.check("score", name, {}, 11, answer).kind for answer in given] == ["correct"] * 2 + ["wrong"] * 2


def test_a_scorer_that_fails_gives_a_verdict() -> None:
    task = ReasoningGym(tasks=LIGHT)
    broken = Problem("?", "1", "k", source='["no_such_task", {}, 1]')
    assert task.grade(broken, "<answer>1</answer>").kind == "crash"


@pytest.mark.parametrize("name", ["prime_factorization", "game_of_life", "boxnet"])
def test_an_answer_at_which_the_scorer_stumbles_is_wrong(name: str) -> None:
    task = ReasoningGym(tasks=(name,))
    problem = task.problem("train", 0, 0)
    verdicts = {task.grade(problem, f"<answer>{answer}</answer>").kind for answer in ("two", "{}", "9" * 300, "[1]")}
    assert verdicts == {"wrong"}


def test_the_packages_own_settings_make_problems_harder() -> None:
    easy, hard = (
        ReasoningGym(tasks=("chain_sum",), settings={"chain_sum": {"min_terms": n, "max_terms": n}}) for n in (2, 9)
    )
    for task, terms in ((easy, 2), (hard, 9)):
        for split in ("train", "heldout"):
            problem = task.problem(split, 0, 0)  # type: ignore[arg-type]
            assert len(problem.prompt.split(" = ")[0].replace(" - ", " + ").split(" + ")) == terms
            assert task.grade(problem, f"<answer>{problem.truth}</answer>").kind == "correct"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"chain_sum": {"min_term": 3}}, "'chain_sum' has no setting 'min_term'; did you mean min_terms?"),
        ({"chain_sum": {"size": 3}}, "'chain_sum' has no setting 'size'"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 3}}, r"refuses settings.chain_sum = .*max_terms must be"),
        ({"chain_sum": {"min_terms": "many"}}, "refuses settings.chain_sum = .*TypeError"),
        ({"leg_counting": {"min_animals": 3}}, r"settings.leg_counting is for none of the tasks \(chain_sum\)"),
    ],
)
def test_settings_that_the_package_does_not_take_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ReasoningGym(tasks=("chain_sum",), settings=settings)


def test_every_task_is_there() -> None:
    assert len(names()) > 100
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        ReasoningGym(tasks=("chain_sums",))
