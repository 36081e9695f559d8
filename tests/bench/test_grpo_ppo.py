"""The comparison of GRPO with PPO at toy size, and the arithmetic of its report."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luciola.bench import grpo_ppo, speculation
from luciola.bench.grpo_ppo import contender, recipe, report
from luciola.bench.turns import Turn
from luciola.cli import app
from luciola.model.language_model import LanguageModel
from luciola.recipe import GrpoRecipe
from luciola.text.tokenizer import Tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
TINY = ["rollout.prompts=2", "rollout.group_size=4", "rollout.max_tokens=3", "grpo.steps=2", "evaluate.problems=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("grpo_ppo") / "model"
    LanguageModel.create(SHAPE | {"vocab_size": 128}, Tokenizer.characters("".join(map(chr, range(32, 127))))).save(
        folder
    )
    return str(folder)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_ppo, "SETTINGS", [*grpo_ppo.SETTINGS, *TINY])


def chosen(model: str, method: str, seed: int = 0) -> GrpoRecipe:
    return recipe(model, seed, grpo_ppo.METHODS[method])


def test_both_differ_in_the_advantage_and_the_critic_alone(model: str) -> None:
    ours, theirs = (chosen(model, name).model_dump() for name in ("grpo", "ppo"))
    assert ours.pop("critic") is None and theirs.pop("critic") is not None
    for parts in (ours["objective"], theirs["objective"]):
        del parts["name"], parts["advantage"], parts["kl"], parts["kl_in"]  # beta is 0: there is no KL
    assert ours["objective"]["beta"] == 0
    assert ours == theirs


def test_a_critic_is_a_second_model_to_hold(model: str) -> None:
    """Weights, gradients and two moments of 4 bytes each, for every parameter of one model or of both."""
    parameters = LanguageModel.create(SHAPE | {"vocab_size": 128}).model.num_parameters()
    ours, theirs = (contender(chosen(model, name), 2.0)() for name in ("grpo", "ppo"))
    for outcome in (ours, theirs):
        assert (outcome["steps"], outcome["samples"], outcome["reached"]) == (1, 8, False)
        assert outcome["seconds"] > 0 and len(outcome["accuracies"]) == 1
        assert outcome["peak_memory_bytes"] > outcome["training_bytes"]
    step_counts = 1000  # AdamW keeps a few bytes of its own for each tensor
    assert ours["training_bytes"] == pytest.approx(16 * parameters, abs=step_counts)
    head = SHAPE["hidden_size"] * 128
    assert theirs["training_bytes"] == pytest.approx(16 * (2 * parameters - head), abs=step_counts)


def test_who_has_arrived_rests(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([0.2, 0.1, 0.95])

    def evaluate(*_: Any, **__: Any) -> Any:
        return type("Evaluation", (), {"figures": {"accuracy": next(measured)}})

    monkeypatch.setattr(grpo_ppo, "evaluate", evaluate)
    step = contender(chosen(model, "ppo"), 0.9)
    outcomes = [dict(step()) for _ in range(6)]
    assert [o["steps"] for o in outcomes] == [1, 2, 3, 3, 3, 3]
    assert [o["reached"] for o in outcomes] == [False, False, True, True, True, True]
    assert outcomes[-1]["accuracies"] == [0.2, 0.1, 0.95]
    assert outcomes[-1] == outcomes[2]


def test_a_model_that_knows_it_all_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_ppo, "TARGET", 0.0)
    with pytest.raises(ValueError, match="answers 0% of the held-out problems right before any training, and 0% is"):
        grpo_ppo.run(model)


def test_a_model_that_cannot_be_asked_is_refused(model: str, tmp_path: Path) -> None:
    LanguageModel.create(SHAPE | {"vocab_size": 128}).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        grpo_ppo.run(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="nowhere"):
        grpo_ppo.run("nowhere")


def outcome(seconds: float, reached: bool = True, memory: int = 100, weights: int = 16) -> dict[str, Any]:
    return {
        "reached": reached, "steps": int(seconds), "samples": 8 * int(seconds), "seconds": seconds,
        "accuracies": [0.4, 0.95 if reached else 0.7], "peak_memory_bytes": memory, "training_bytes": weights,
    }  # fmt: skip


def test_the_report_has_medians_and_what_ppo_needs_more() -> None:
    ppo = [outcome(20, memory=150, weights=32), outcome(60), outcome(40)]
    ppo = [run | {"explained_variance": share} for run, share in zip(ppo, (0.1, 0.3, 0.2), strict=True)]
    result = report({"grpo": [outcome(10), outcome(30), outcome(20)], "ppo": ppo}, 0.9)
    assert result["grpo"]["seconds"] == 20 and result["ppo"]["samples"] == 320
    assert result["ppo"]["explained_variance"] == 0.2 and "explained_variance" not in result["grpo"]
    assert result["ppo"]["reached"] == 3 and result["ppo"]["seconds_each"] == [20, 60, 40]
    expected = {"seconds": 2, "steps": 2, "samples": 2, "seconds_per_step": 1, "peak_memory_bytes": 1.5}
    assert result["ppo_over_grpo"] == expected | {"training_bytes": 2}
    assert result["conclusion"] == "both reached 90% with every seed"


def test_a_seed_that_never_arrives_is_said_and_not_left_out_of_a_median() -> None:
    result = report({"grpo": [outcome(10), outcome(30)], "ppo": [outcome(20), outcome(60, reached=False)]}, 0.9)
    assert result["ppo"]["seconds"] is result["ppo"]["steps"] is result["ppo"]["samples"] is None
    assert result["grpo"]["seconds"] == 20
    assert result["ppo_over_grpo"].keys() == {"seconds_per_step", "peak_memory_bytes", "training_bytes"}
    assert result["conclusion"] == "no comparison of time to 90%: ppo did so with 1 of 2 seeds within 60 steps"


def test_the_command_trains_each_seed_with_both(model: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, to the JSON; contenders here in this process instead of their own."""
    seen: list[tuple[int, str]] = []

    def take_turns(contenders: Any, rounds: int, warmup: int) -> dict[str, list[Turn]]:
        assert (rounds, warmup) == (2, 0)
        steps = {name: contender(**arguments) for name, (_, arguments) in contenders.items()}
        seen.extend((arguments["recipe"].seed, name) for name, (_, arguments) in contenders.items())
        return {name: [Turn(1.0, step()) for _ in range(rounds)] for name, step in steps.items()}

    monkeypatch.setattr(grpo_ppo, "take_turns", take_turns)
    found = CliRunner().invoke(app, ["bench", "grpo-ppo", "--model", model, "--output", "out.json"])
    assert found.exit_code == 0, found.output
    assert seen == [(seed, name) for seed in grpo_ppo.SEEDS for name in ("grpo", "ppo")]
    result = json.loads(Path("out.json").read_text())["grpo-ppo"]
    assert result["conclusion"].startswith("no comparison of time to 95%: grpo did so with 0 of 5 seeds")
    assert result["grpo"]["reached"] == result["ppo"]["reached"] == 0
    assert 1.5 < result["ppo_over_grpo"]["training_bytes"] < 2
    assert result["model"] == model and result["seeds"] == 5


def test_only_comparisons_that_train_a_model_take_one() -> None:
    found = CliRunner().invoke(app, ["bench", "speculation", "--model", "somewhere"])
    assert found.exit_code != 0
    assert "speculation has a model of its own; leave --model out" in str(found.exception) + found.output
    assert not speculation.PEERS
