"""A rollout: problems of its own step, rewards from verdicts, verifiers that fail, and samples to read."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from luciola.engine.engine import Completion, Engine
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.recipe import GrpoRecipe
from luciola.rl.credit import sequences
from luciola.rl.rollout import Rollout, rollout
from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import Problem
from luciola.verify import own
from luciola.verify.pool import Pool
from luciola.verify.verdict import Verdict

Make = Callable[..., GrpoRecipe]
R1 = "<think>x</think><answer>{}</answer>"


class Scripted:
    """An engine that gives completion i of a call the i-th text, round and round."""

    def __init__(self, texts: Sequence[str], token_ids: Sequence[int] = (1, 2)) -> None:
        self.texts, self.token_ids, self.params, self.asked = texts, [*token_ids], [], []

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], **_: Any) -> list[list[Completion]]:
        self.params, self.asked = params, prompts
        numbers = iter(range(10_000))
        return [
            [Completion(self.texts[next(numbers) % len(self.texts)], self.token_ids, "stop", [0.0] * 2, [0.0] * 2)]
            * p.n
            for p in params
        ]


class Verifier(Arithmetic):
    """Arithmetic whose verdict is spelled out in the completion."""

    def grade(self, problem: Problem, completion: str) -> Verdict:
        if completion == "raise":
            raise RuntimeError("the verifier's own mistake")
        kind: Any = completion
        return Verdict(kind, 1.0 if kind == "correct" else 0.0, f"it was {kind}")


def judged(lm: LanguageModel, recipe: GrpoRecipe, texts: Sequence[str]) -> Rollout:
    """What comes of these completions under the verifier above, one text a group."""
    assert lm.tokenizer is not None
    swapped = recipe.model_copy(update={"task": Verifier()})
    return rollout(Scripted(texts), lm.tokenizer, swapped, 0)  # type: ignore[arg-type]


def test_rewards_are_accuracy_and_form_weighted(lm: LanguageModel, recipe: Make) -> None:
    chosen = recipe(
        rollout={"prompts": 4, "group_size": 2}, reward={"accuracy": 2.0, "format": 0.5}, task={"answer_form": "r1"}
    )
    assert lm.tokenizer is not None
    truths = [chosen.task.problem("train", i, 0).truth for i in range(4)]
    texts = [R1.format(truths[0]), R1.format(99), f"<answer>{truths[2]}</answer>", "what?"]
    found = rollout(Scripted(texts), lm.tokenizer, chosen, 0)  # type: ignore[arg-type]
    assert found.rewards_PG.tolist() == [[2.5] * 2, [0.5] * 2, [2.0] * 2, [0.0] * 2]
    assert bool(found.known_PG.all())
    metrics = found.metrics()
    kinds = ("correct", "wrong", "no_answer", "timeout", "crash")
    assert [metrics[f"verdict/{kind}"] for kind in kinds] == [4, 2, 2, 0, 0]
    assert metrics["reward/mean"] == pytest.approx(1.25)
    assert metrics["reward/format"] == pytest.approx(0.5)


def test_each_step_has_problems_and_seeds_of_its_own(lm: LanguageModel, recipe: Make) -> None:
    assert lm.tokenizer is not None
    asked, seeds = [], []
    for step in (0, 1, 0):
        engine = Scripted(["1"])
        rollout(engine, lm.tokenizer, recipe(rollout={"prompts": 3}), step)  # type: ignore[arg-type]
        asked.append(engine.asked)
        seeds.append([p.seed for p in engine.params])
        expected = [recipe().task.problem("train", 3 * step + i, 0) for i in range(3)]
        assert engine.asked == [lm.tokenizer.chat(recipe().task.messages(p)) for p in expected]
        assert all(p.n == 8 and p.logprobs and p.routes for p in engine.params)
    assert asked[0] == asked[2] != asked[1]
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 6


def test_a_verifier_that_fails_now_and_then_masks_the_sample(lm: LanguageModel, recipe: Make) -> None:
    many = recipe(rollout={"prompts": 40, "group_size": 2})
    for kind in ("crash", "timeout", "raise"):
        found = judged(lm, many, [kind] + ["correct", "wrong"] * 20)
        assert found.known_PG.tolist() == [[False, False]] + [[True, True]] * 39
        assert found.metrics()["reward/mean"] == pytest.approx(20 / 39)  # of those that are known
        assert found.metrics()["verdict/timeout" if kind == "timeout" else "verdict/crash"] == 2


@pytest.mark.parametrize("kind", ["crash", "timeout"])
def test_a_verifier_that_fails_often_stops_the_run(lm: LanguageModel, recipe: Make, kind: str) -> None:
    few = recipe(rollout={"prompts": 10, "group_size": 2})
    with pytest.raises(
        ValueError, match=rf"the verifier failed on 2 of the first 2 completions of step 1, .*20 \({kind}: it was"
    ):
        judged(lm, few, [kind] + ["wrong"] * 9)


def test_a_verifier_that_is_slow_to_fail_is_not_asked_to_the_end(lm: LanguageModel, recipe: Make) -> None:
    asked = []

    class Slow(Arithmetic):
        def grade(self, problem: Problem, completion: str) -> Verdict:
            asked.append(completion)
            time.sleep(0.05)
            return Verdict("timeout", 0.0, "no result")

    assert lm.tokenizer is not None
    many = recipe(rollout={"prompts": 100, "group_size": 2}).model_copy(update={"task": Slow()})
    with pytest.raises(ValueError, match=r"failed on 11 of the first 11 completions of step 1, .* 5% of its 200 "):
        rollout(Scripted(["4"]), lm.tokenizer, many, 0)  # type: ignore[arg-type]
    assert 6 <= len(asked) < 70  # equal completions of a problem are graded once


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"reward": {"accuracy": 0.0, "format": 1.0}}, False),
        ({"reward": {"accuracy": 0.0, "format": 1.0, "length": 0.1}}, True),  # of right answers only
        ({"reward": {"accuracy": 0.0, "format": 1.0}, "objective": {"name": "rft"}}, True),
    ],
)
def test_a_verifier_from_which_nothing_is_learnt_may_fail(
    lm: LanguageModel, recipe: Make, changes: dict[str, Any], counts: bool
) -> None:
    chosen = recipe(rollout={"prompts": 10, "group_size": 2}, **changes)
    if counts:
        with pytest.raises(ValueError, match="the verifier failed"):
            judged(lm, chosen, ["crash"] * 10)
        return
    found = judged(lm, chosen, ["crash"] * 10)
    assert bool(found.known_PG.all())
    assert found.metrics()["verdict/crash"] == 20  # still logged


def test_exactly_five_percent_is_still_tolerated(lm: LanguageModel, recipe: Make) -> None:
    judged(lm, recipe(rollout={"prompts": 20, "group_size": 2}), ["crash"] + ["wrong"] * 19)


def test_with_process_supervision_a_group_differs_where_its_steps_do(lm: LanguageModel, recipe: Make) -> None:
    """Group 0: steps differ within each completion, whose rewards are equal; the others have one equal step each."""

    class Steps(Arithmetic):
        def grade_steps(self, problem: Problem, completion: str) -> list[tuple[int, float]]:
            return [(1, 0.0), (2, 1.0)] if completion == "two" else [(2, 1.0)]

    chosen = recipe(rollout={"prompts": 3, "group_size": 2}, objective={"supervision": "process", "refills": 1})
    chosen = chosen.model_copy(update={"task": Steps()})
    assert lm.tokenizer is not None
    engine = Scripted(["two", "one", "one"], lm.tokenizer.encode("12"))
    found = rollout(engine, lm.tokenizer, chosen, 0)  # type: ignore[arg-type]
    assert found.teaching("group").tolist() == [True, True, False]  # the second round began with "two" again
    assert found.refilled == 1
    samples = sequences(found, chosen)
    assert [any(bool(s.advantages_T.any()) for s in samples[2 * p : 2 * p + 2]) for p in range(3)] == [
        True, True, False,
    ]  # fmt: skip
    found.known_PG[1] = False
    assert found.teaching("group").tolist() == [True, False, False]


@pytest.mark.parametrize(("name", "refilled"), [("grpo", 3), ("ppo", 0), ("rft", 1), ("dpo", 3), ("reinforce++", 0)])
def test_groups_give_way_where_they_have_nothing_to_teach_this_objective(
    lm: LanguageModel, recipe: Make, name: str, refilled: int
) -> None:
    """Three groups of two equal completions, of which the first and the last are right; then rounds of mixed groups."""
    chosen = recipe(rollout={"prompts": 3, "group_size": 2}, objective={"name": name, "refills": 2})
    chosen = chosen.model_copy(update={"task": Verifier()})

    class Rounds(Scripted):
        def generate(self, prompts: list[list[int]], params: list[SamplingParams], **_: Any) -> list[list[Completion]]:
            groups = super().generate(prompts, params)
            if self.texts == FIRST:
                self.texts = ["correct", "wrong"]
                return groups
            return [[replace(group[0], text=text) for text in self.texts] for group in groups]

    FIRST = ["correct", "wrong", "correct"]
    assert lm.tokenizer is not None
    found = rollout(Rounds(FIRST), lm.tokenizer, chosen, 0)  # type: ignore[arg-type]
    assert found.refilled == refilled
    assert bool(found.teaching(chosen.objective.advantage).all())


def test_samples_to_read_come_from_several_groups(lm: LanguageModel, recipe: Make) -> None:
    found = judged(lm, recipe(rollout={"prompts": 5, "group_size": 3}), ["correct", "wrong", "no_answer"])
    samples = found.samples(groups=3, each=2)
    assert len(samples) == 6
    assert len({s["prompt"] for s in samples}) > 1
    for sample in samples:
        assert sample["detail"] == f"it was {sample['verdict']}"
        assert sample["reward"] == float(sample["verdict"] == "correct")
        assert {"prompt", "truth", "completion", "finish_reason"} <= sample.keys()


def test_truncation_and_length_are_counted(lm: LanguageModel, recipe: Make) -> None:
    assert lm.tokenizer is not None
    found = rollout(Engine(lm, dtype="model"), lm.tokenizer, recipe(rollout={"max_tokens": 3}), 0)
    lengths = torch.tensor([[len(c.token_ids) for c in group] for group in found.completions])
    metrics = found.metrics()
    assert metrics["completion/length"] == pytest.approx(float(lengths.float().mean()))
    assert metrics["completion/max_length"] == 3
    cut = sum(c.finish_reason == "length" for group in found.completions for c in group)
    assert metrics["completion/truncated"] == pytest.approx(cut / lengths.numel())


def test_ones_own_functions_are_called_while_the_rest_is_sampled(
    lm: LanguageModel, recipe: Make, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first completion waits for its function's note; were they called after the rollout, none would come."""
    (workplace / "slow.py").write_text(
        "import time\n"
        "def noting(prompt, completion, truth):\n"
        "    open('called', 'w').close()\n"
        "    time.sleep(0.01 * (len(completion) % 3))\n"
        "    return len(prompt) + 100 * len(completion) + 1_000 * (sum(map(ord, completion)) % 997)\n"
    )
    pool = Pool(size=2, seconds=20, memory_mb=own.MEMORY_MB, program=own.WORKER)
    monkeypatch.setattr(own, "_pool", lambda: pool)
    chosen = recipe(rollout={"prompts": 4, "group_size": 2, "max_tokens": 12}, reward={"own": {"slow:noting": 1.0}})
    engine, seen_early = Engine(lm, dtype="model"), []
    whole = engine.generate

    def watched(*args: Any, ended: Any, **named: Any) -> Any:
        def noting(i: int, completion: Completion) -> None:
            ended(i, completion)
            end = time.monotonic() + 20
            while engine.stats["running"] and not Path("called").exists() and time.monotonic() < end:
                time.sleep(0.01)
            if engine.stats["running"]:
                seen_early.append(Path("called").exists())

        return whole(*args, ended=noting, **named)

    engine.generate = watched  # type: ignore[method-assign]
    assert lm.tokenizer is not None
    with pool:
        found = rollout(engine, lm.tokenizer, chosen, 0)
    assert seen_early and all(seen_early)
    assert found.parts["slow:noting"].tolist() == [
        [len(p.prompt) + 100 * len(c.text) + 1_000 * (sum(map(ord, c.text)) % 997) for c in group]
        for p, group in zip(found.problems, found.completions, strict=True)
    ]


def test_what_has_ended_is_judged_while_the_rest_is_sampled(lm: LanguageModel, recipe: Make) -> None:
    """The verifier waits until the engine's last step but one has passed; a rollout that judges at its end would
    deadlock here, and the wait gives up."""
    chosen, graded = recipe(rollout={"prompts": 4, "group_size": 2, "max_tokens": 12}), threading.Event()

    class Noting(Arithmetic):
        graded_elsewhere: ClassVar[bool] = True

        def grade(self, problem: Problem, completion: str) -> Verdict:
            graded.set()
            return super().grade(problem, completion)

    engine, seen_early = Engine(lm, dtype="model"), []
    whole = engine.generate

    def watched(*args: Any, ended: Any, **named: Any) -> Any:
        def noting(i: int, completion: Completion) -> None:
            ended(i, completion)
            if engine.stats["running"]:
                seen_early.append(graded.wait(20))

        return whole(*args, ended=noting, **named)

    engine.generate = watched  # type: ignore[method-assign]
    assert lm.tokenizer is not None
    swapped = chosen.model_copy(update={"task": Noting()})
    found = rollout(engine, lm.tokenizer, swapped, 0)
    assert seen_early and all(seen_early)
    assert found.verdicts == rollout(Engine(lm, dtype="model"), lm.tokenizer, swapped, 0).verdicts
