"""Rejection sampling: what gets into the fine-tuning data, and that a killed run makes the same."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luciola.recipe import PretrainRecipe, RejectionRecipe, check
from luciola.recipe.pipeline import SelectSection
from luciola.rl.rejection import rejection, select
from luciola.train.pretrain import pretrain

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6, "initializer_range": 0.15,
}  # fmt: skip
GOOD = "<think>\none two\n</think>\n<answer>3</answer>"


def candidate(completion: str = GOOD, **changes: Any) -> dict[str, Any]:
    row = {"key": "1+2", "completion": completion, "verdict": "correct", "tokens": 20, "finish_reason": "stop"}
    return row | changes


def reasons(*candidates: dict[str, Any], **settings: Any) -> dict[str, int]:
    return dict(select(candidates, SelectSection(**settings)).refused)


def test_a_right_well_formed_completion_is_kept() -> None:
    assert select([candidate()], SelectSection()).kept == [candidate()]


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (candidate(verdict="wrong"), {}, "wrong"),
        (candidate(verdict="timeout"), {}, "timeout"),
        (candidate(finish_reason="length"), {}, "truncated"),
        (candidate("<answer>3</answer>"), {}, "malformed"),
        (candidate("<think>eins 二 три four</think><answer>3</answer>"), {"language": 0.9}, "language"),
        (candidate(tokens=21), {"max_tokens": 20}, "long"),
        (candidate("<think>abcdef\n\ngh</think><answer>3</answer>"), {"max_paragraph": 5}, "paragraph"),
        (candidate("<think>```x```</think><answer>3</answer>"), {"code_blocks": False}, "code"),
    ],
)
def test_each_fault_keeps_a_completion_out(row: dict[str, Any], settings: dict[str, Any], reason: str) -> None:
    assert reasons(row, **settings) == {reason: 1}


def test_what_is_not_asked_for_is_no_fault() -> None:
    digits = candidate("<think>1+2=03</think><answer>3</answer>")
    assert reasons(digits, language=1.0) == {}, "thinking without words is in no foreign language"
    assert reasons(candidate("3"), well_formed=False) == {}
    assert reasons(candidate(tokens=20), max_tokens=20) == {}


def test_duplicates_and_more_than_enough_of_a_problem_are_left_out() -> None:
    spaced, other = candidate(GOOD.replace("\n", "  ")), candidate(GOOD.replace("two", "more"))
    assert reasons(candidate(), spaced, other, per_problem=2) == {"duplicate": 1}
    assert reasons(candidate(), other) == {"enough": 1}
    assert reasons(candidate(), candidate(key="2+1")) == {}, "the same words for another problem are no duplicate"


rows = st.builds(
    candidate,
    st.sampled_from([GOOD, GOOD + " ", GOOD.replace("two", "more"), "3", "<think></think><answer>3</answer>"]),
    key=st.sampled_from("abc"),
    verdict=st.sampled_from(["correct", "wrong", "no_answer", "crash"]),
    finish_reason=st.sampled_from(["stop", "length"]),
)


@given(st.lists(rows, max_size=30), st.integers(1, 3))
def test_whatever_is_sampled_only_different_right_ones_are_kept(found: list[dict[str, Any]], most: int) -> None:
    kept, refused = select(found, SelectSection(per_problem=most))
    assert len(kept) + refused.total() == len(found)
    assert all(row["verdict"] == "correct" and row["finish_reason"] == "stop" for row in kept)
    texts = [(row["key"], " ".join(row["completion"].split())) for row in kept]
    assert len(set(texts)) == len(texts)
    assert max(Counter(key for key, _ in texts).values(), default=0) <= most
    assert select(kept, SelectSection(per_problem=most)).kept == kept, "selecting twice changes nothing"


TASK = {"name": "arithmetic", "max_value": 4, "phrasing": "symbols", "answer_form": "last_number"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that ends its answers, of which some are right."""
    folder = tmp_path_factory.mktemp("taught")
    settings = {
        "steps": 60,
        "dtype": "float32",
        "run": {"name": "base", "folder": str(folder)},
        "task": TASK,
        "model": {"config": SHAPE},
        "tokenizer": {"kind": "characters", "alphabet": "012345678+=? "},
        "data": {"batch_size": 16, "sequence_length": 40},
        "optim": {"lr": 1e-2},
    }
    return str(pretrain(check(PretrainRecipe, settings, "test")))


@pytest.fixture
def sampling(taught: str, tmp_path: Path) -> Callable[..., RejectionRecipe]:
    def make(name: str, **changes: Any) -> RejectionRecipe:
        settings = {
            "steps": 4,
            "dtype": "float32",
            "run": {"name": name, "folder": str(tmp_path)},
            "task": TASK,
            "model": {"path": taught},
            "rollout": {"prompts": 6, "group_size": 4, "max_tokens": 12},
            "select": {"well_formed": False, "per_problem": 2},
            "general": {"rows": 5, "task": TASK | {"phrasing": "words"}},
        }
        return check(RejectionRecipe, settings | changes, "test")

    return make


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("sft.jsonl", "candidates.jsonl", "samples.jsonl")]


def test_the_data_of_a_seed_is_the_same_again_and_after_a_kill(
    sampling: Callable[..., RejectionRecipe], kill_at: Callable[..., int]
) -> None:
    whole = rejection(sampling("whole"))
    assert contents(rejection(sampling("again"))) == contents(whole)
    killed, rng = sampling("killed"), random.Random(0)
    for lines in (1, 3):
        kill_at(rejection, killed, lines, rng)
    assert contents(rejection(killed, resume=True)) == contents(whole)
    assert contents(rejection(sampling("other", seed=1))) != contents(whole)


def test_what_it_wrote_is_right_and_its_counts_add_up(sampling: Callable[..., RejectionRecipe]) -> None:
    recipe = sampling("counted")
    run = rejection(recipe)
    summary = json.loads((run / "summary.json").read_text())
    written = [json.loads(line)["messages"] for line in (run / "sft.jsonl").read_text().splitlines()]
    assert len(written) == summary["kept"] + summary["general"]
    assert summary["kept"] > 0 and summary["general"] == 5
    assert summary["candidates"] == 4 * 6 * 4 == summary["kept"] + sum(summary["refused"].values())
    rows = [json.loads(line) for line in (run / "candidates.jsonl").read_text().splitlines()]
    wrong = [row["messages"] for row in rows if row["verdict"] != "correct"]
    assert wrong and not any(messages in wrong for messages in written)


def test_data_without_a_single_right_answer_is_refused(sampling: Callable[..., RejectionRecipe]) -> None:
    recipe = sampling("none", steps=1, select={"well_formed": True})
    with pytest.raises(ValueError, match=r"none of 24 completions is worth keeping .*malformed") as failure:
        rejection(recipe)
    for mend in (f"delete {recipe.run.folder}/none,", "a higher rejection.steps", "a looser rejection.select"):
        assert mend in str(failure.value)
