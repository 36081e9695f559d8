"""Replay: what is kept, what is drawn, and that a resumed run draws the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from luciola.recipe import GrpoRecipe
from luciola.rl.batch import Sample
from luciola.rl.grpo import grpo
from luciola.rl.replay import Replay

Make = Callable[..., GrpoRecipe]


def group(number: int, advantages: tuple[float, ...] = (0.5, -0.5), lengths: tuple[int, ...] = (2, 3)) -> list[Sample]:
    """Completions of the tokens `number`, of different lengths, sampled with log-probabilities that tell them apart."""
    prompt = [number, number]
    return [
        Sample(
            prompt, [number] * n, [-0.1 * number] * n, [-0.1 * number] * n, torch.full((n,), a), known=True,
            routes_TLK=torch.full((n + 1, 1, 2), number, dtype=torch.int16),
            kept=[torch.arange(number % 3 + 1) for _ in range(n)],
            pair=g if number % 2 else None,
        )
        for g, (a, n) in enumerate(zip(advantages, lengths, strict=True))
    ]  # fmt: skip


def names(samples: list[Sample]) -> list[int]:
    return [sample.prompt[0] for sample in samples]


def test_the_newest_groups_with_something_to_learn_are_kept() -> None:
    replay = Replay(0.5, most=3)
    replay.add([group(1), group(2, (0.0, 0.0)), group(3)])
    assert [names(kept)[0] for kept in replay.groups] == [1, 3]
    replay.add([group(4), group(5)])
    assert [names(kept)[0] for kept in replay.groups] == [3, 4, 5]


def test_a_draw_is_a_function_of_seed_and_step_without_repetition() -> None:
    replay = Replay(0.5, most=8)
    assert replay.draw(0, 0) == []
    replay.add([group(i) for i in range(1, 9)])
    draws = [names(replay.draw(0, step)) for step in range(20)]
    assert all(len(draw) == 4 * 2 and len(set(draw)) == 4 for draw in draws)  # half of eight, whole groups of two
    assert draws == [names(replay.draw(0, step)) for step in range(20)]
    assert len({tuple(draw) for draw in draws}) > 10
    assert names(replay.draw(1, 0)) != draws[0]
    assert Replay(0.01, most=8).number == 1


def test_drawn_samples_are_stale_and_older_than_any_pi_old_computed_since() -> None:
    """A second draw starts from the sampler's log-probabilities again."""
    replay = Replay(1.0, most=1)
    replay.add([group(3)])
    (first, _) = replay.draw(0, 1)
    assert first.stale
    first.old_logp = [-9.0, -9.0]
    (again, _) = replay.draw(0, 2)
    assert again is first and again.old_logp == again.sampler_logp == [-0.1 * 3] * 2


def test_what_is_kept_comes_back_from_a_file() -> None:
    replay = Replay(1.0, most=4)
    replay.add([group(1), group(2, (0.5, -0.5), (0, 4)), group(3)])
    restored = Replay(1.0, most=4)
    restored.restore(load(save(replay.state())))
    for ours, theirs in zip(replay.draw(5, 7), restored.draw(5, 7), strict=True):
        assert (ours.prompt, ours.completion, ours.known, ours.pair) == (
            theirs.prompt, theirs.completion, theirs.known, theirs.pair,
        )  # fmt: skip
        assert ours.old_logp == theirs.old_logp and ours.sampler_logp == theirs.sampler_logp
        assert torch.equal(ours.advantages_T, theirs.advantages_T)
        assert torch.equal(ours.routes_TLK, theirs.routes_TLK)  # type: ignore[arg-type]
        assert [ids.tolist() for ids in ours.kept or ()] == [ids.tolist() for ids in theirs.kept or ()]
    assert len({id(sample.prompt) for sample in restored.draw(5, 7)}) == 3  # the samples of a group share their prompt


def test_a_resumed_run_learns_from_the_same_groups(recipe: Make, steps_of: Callable[[Path], Any]) -> None:
    settings: dict[str, Any] = {
        "grpo": {"steps": 4, "replay": 0.5},
        "rollout": {"prompts": 6, "group_size": 16, "max_tokens": 3},
        "objective": {"importance_cap": 2.0, "off_policy_delta": 0.5},
        "evaluate": {"problems": 2, "samples": 0},
    }
    whole = grpo(recipe("whole", **settings))
    assert any(step["groups/replayed"] for step in steps_of(whole)[2:])
    halved = whole.with_name("halved")
    shutil.copytree(whole, halved)
    for name in ("checkpoints/step-000004", "model"):
        shutil.rmtree(halved / name)
    (halved / "summary.json").unlink()
    grpo(recipe("halved", **settings), resume=True)
    assert steps_of(halved) == steps_of(whole)
    file = "model/model.safetensors"
    assert (halved / file).read_bytes() == (whole / file).read_bytes()
