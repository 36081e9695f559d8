"""Whole GRPO runs: killed ones end as if they had not been, the reward rises, and what goes wrong is said."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import luciola
from luciola.model.language_model import LanguageModel
from luciola.recipe import GrpoRecipe, check
from luciola.rl import grpo as module
from luciola.rl.grpo import grpo
from luciola.tasks.arithmetic import Arithmetic
from luciola.train.stopping import Diverged

Make = Callable[..., GrpoRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]

PHYSICAL = {"seconds", "training_seconds"}
# Everything that a checkpoint has to remember: a reference that is refreshed, moments, biases, the place in the data.
FULL: dict[str, dict[str, Any]] = {
    "grpo": {"steps": 8, "reference_refresh": 3, "updates_per_rollout": 2, "epochs": 2},
    "objective": {"beta": 0.1},
    "evaluate": {"every": 3, "problems": 4, "samples": 2},
    "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 2},
}


def figures(run: Path) -> dict[str, Any]:
    """The summary, without what depends on the speed of the machine."""
    summary = json.loads((run / "summary.json").read_text())
    return {when: {k: v for k, v in summary[when].items() if k not in PHYSICAL} for when in ("before", "after")}


def same_run(a: Path, b: Path, steps_of: Steps) -> None:
    assert steps_of(a) == steps_of(b)
    assert figures(a) == figures(b)
    for name in ("samples.jsonl", "heldout.jsonl", "model/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def based(recipe: Make, name: str) -> GrpoRecipe:
    """A run that pre-trains its base first."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    base = {
        "steps": 6,
        "dtype": "float32",
        "model": {"config": shape},
        "tokenizer": {"kind": "characters", "alphabet": "012345678+=? "},
        "data": {"batch_size": 4, "sequence_length": 40},
    }
    return recipe(name, base=base, **(FULL | {"grpo": {"steps": 6}}))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_ends_as_if_it_had_never_stopped(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps, seed: int
) -> None:
    rng = random.Random(seed)
    whole = grpo(recipe("whole", **FULL))
    killed = recipe("killed", **FULL)
    for lines in sorted(rng.sample(range(8), 2)):
        kill_at(grpo, killed, lines, rng)
    same_run(grpo(killed, resume=True), whole, steps_of)
    assert len(steps_of(whole)) == 8


def test_a_run_killed_in_its_pre_training_and_again_after_it(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps
) -> None:
    whole = grpo(based(recipe, "whole"))
    killed, rng = based(recipe, "killed"), random.Random(0)
    kill_at(grpo, killed, 3, rng, part="base")
    kill_at(grpo, killed, 2, rng)
    same_run(grpo(killed, resume=True), whole, steps_of)
    same_base = [(run / "base" / "model" / "model.safetensors").read_bytes() for run in (whole, killed_path(killed))]
    assert same_base[0] == same_base[1]
    summary = json.loads((killed_path(killed) / "summary.json").read_text())
    steps = [json.loads(line) for line in (killed_path(killed) / "metrics.jsonl").read_text().splitlines()]
    spent = sum(step[f"seconds/{part}"] for step in steps for part in ("rollout", "verify", "update"))
    assert summary["after"]["training_seconds"] == round(spent, 1)
    kept = killed_path(killed) / "checkpoints" / "step-000006" / "state.json"
    assert json.loads(kept.read_text())["facts"]["seconds"] >= spent, "the steps of killed processes count"


def test_time_spent_before_an_interruption_and_on_the_base_counts(recipe: Make) -> None:
    run = grpo(based(recipe, "timed"))
    kept, base, whole = (
        run / "checkpoints" / "step-000006" / "state.json",
        run / "base" / "summary.json",
        run / "summary.json",
    )
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"facts": {"seconds": 1000.0}}))
    base.write_text(json.dumps(json.loads(base.read_text()) | {"seconds": 5000.0}))
    whole.unlink()
    summary = json.loads((grpo(based(recipe, "timed"), resume=True) / "summary.json").read_text())
    assert 6000 <= summary["seconds"] < 7000
    assert summary["before"]["training_seconds"] == 5000


def killed_path(recipe: GrpoRecipe) -> Path:
    return Path(recipe.run.folder, recipe.run.name)


def test_ctrl_c_saves_the_step_it_is_in(recipe: Make, steps_of: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = grpo(recipe("whole", **FULL))
    stopped = recipe("stopped", checkpoint_every=0, **FULL)
    with monkeypatch.context() as patch:
        real = module.update

        def update(*arguments: Any) -> dict[str, Any]:
            if arguments[5] == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments)

        patch.setattr(module, "update", update)
        with pytest.raises(KeyboardInterrupt):
            grpo(stopped)
    assert [p.name for p in (killed_path(stopped) / "checkpoints").iterdir()] == ["step-000005"]
    same_run(grpo(stopped, resume=True), whole, steps_of)


def test_the_reference_is_refreshed_when_the_recipe_says_so(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two steps the policy as it then is becomes the reference; in between the reference stays."""
    seen = []
    real = module.update

    def update(model: torch.nn.Module, optimizer: Any, reference: torch.nn.Module, *more: Any) -> dict[str, Any]:
        seen.append(tuple(m.lm_head.weight.detach().clone() for m in (model, reference)))
        return real(model, optimizer, reference, *more)

    monkeypatch.setattr(module, "update", update)
    grpo(recipe(grpo={"steps": 6, "reference_refresh": 2}, objective={"beta": 0.1}))
    for step, (policy, reference) in enumerate(seen):
        assert torch.equal(reference, seen[step - step % 2][0])
        assert torch.equal(policy, reference) == (step % 2 == 0)


def test_a_run_that_diverges_stops_with_the_step_and_the_last_checkpoint(recipe: Make, steps_of: Steps) -> None:
    wild = recipe("wild", checkpoint_every=1, optim={"lr": 1e30, "clip_grad_norm": 0})
    with pytest.raises(Diverged, match=r"(loss|grad_norm) is (nan|inf) at step \d; the run has stopped") as found:
        grpo(wild)
    done = len(steps_of(killed_path(wild)))
    assert f"at step {done + 1}" in str(found.value)
    assert f"the last good checkpoint is {killed_path(wild) / 'checkpoints' / f'step-{done:06}'}" in str(found.value)


def test_weights_that_went_astray_unseen_stop_the_next_rollout(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Huge weights can leave the update finite and its next logits not."""
    original = module.update

    def update(model: Any, *args: Any) -> Any:
        metrics = original(model, *args)
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.inf)
        return metrics

    monkeypatch.setattr(module, "update", update)
    with pytest.raises(Diverged, match=r"a logit is nan at step 2; the run has stopped"):
        grpo(recipe("astray", checkpoint_every=1))


def test_a_verifier_that_always_fails_stops_the_run(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(self: Any, problem: Any, completion: str) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(Arithmetic, "grade", grade)
    with pytest.raises(
        ValueError, match=r"failed on (\d+) of the first \1 .* step 1, .*\(crash: ZeroDivisionError: division by zero; "
    ):
        grpo(recipe())


def test_a_model_without_a_tokenizer_is_refused(recipe: Make, lm: LanguageModel, tmp_path: Path) -> None:
    LanguageModel(lm.model).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer to write prompts with"):
        grpo(recipe(model={"path": str(tmp_path / "bare")}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_in_either_precision_leaves_a_model(recipe: Make, steps_of: Steps, dtype: str) -> None:
    """Engine and trainer are the same arithmetic in float32; in bfloat16 decoding and training round differently."""
    chosen = check(GrpoRecipe, recipe(grpo={"steps": 3}).model_dump(exclude_none=True) | {"dtype": dtype}, "test")
    run = grpo(chosen)
    assert all(step["kl/engine"] < (1e-6 if dtype == "float32" else 1e-2) for step in steps_of(run))
    lm = luciola.load(run)
    assert lm.tokenizer is not None
    assert lm.model(torch.tensor([[7, 8]])).isfinite().all()


def test_the_reward_rises(recipe: Make, steps_of: Steps) -> None:
    """A random model learns to add numbers up to 4: 72 % here, where the best single answer would be right for 20 %."""
    learning = recipe(
        "learning",
        checkpoint_every=0,
        rollout={"prompts": 8, "group_size": 16, "max_tokens": 1},
        grpo={"steps": 100},
        objective={"aggregation": "token"},
        optim={"lr": 1e-2, "schedule": "linear", "final_lr_ratio": 0.0},
    )
    rewards = [step["reward/mean"] for step in steps_of(grpo(learning))]
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-10:]) / 10 > 0.4
