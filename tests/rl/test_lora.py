"""GRPO on adapters: the engine samples from the weights that are trained, and runs resume with their reference."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luciola
from luciola.recipe import GrpoRecipe
from luciola.rl.grpo import describe, grpo

Make = Callable[..., GrpoRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]
LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0}
# A reference that is refreshed, replayed groups, moments: everything that a checkpoint has to remember.
FULL: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "grpo": {"steps": 8, "reference_refresh": 3, "updates_per_rollout": 2, "epochs": 2},
    "objective": {"beta": 0.1},
    "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
}


def adapter(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


def test_the_engine_samples_from_the_adapted_weights(recipe: Make, steps_of: Steps, tmp_path: Path) -> None:
    """Rollout and trainer agree at every step, also after the adapters have moved the policy."""
    start = (tmp_path / "start" / "model.safetensors").read_bytes()
    steps = steps_of(grpo(recipe(lora=LORA, grpo={"steps": 6}, objective={"beta": 0.1}, optim={"lr": 3e-2})))
    assert all(step["kl/engine"] < 1e-6 for step in steps)
    assert steps[0]["kl/reference"] < 1e-6
    assert steps[-1]["kl/reference"] > 1e-3, "the policy has left the base"
    assert (tmp_path / "start" / "model.safetensors").read_bytes() == start


def test_adapters_learn(recipe: Make, steps_of: Steps) -> None:
    """Though embeddings, router, routed experts and head stay random: 37 % here, where the best single answer would be
    right for 20 %."""
    learning = recipe(
        "learning",
        checkpoint_every=0,
        lora={"rank": 6, "alpha": 24.0},
        rollout={"prompts": 8, "group_size": 16, "max_tokens": 1},
        grpo={"steps": 100},
        objective={"aggregation": "token"},
        optim={"lr": 5e-3, "schedule": "linear", "final_lr_ratio": 0.0},
    )
    rewards = [step["reward/mean"] for step in steps_of(grpo(learning))]
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-10:]) / 10 > 0.25


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_ends_as_if_it_had_never_stopped(
    recipe: Make, kill_at: Callable[..., int], steps_of: Steps, seed: int
) -> None:
    rng = random.Random(seed)
    whole = grpo(recipe("whole", **FULL))
    killed = recipe("killed", **FULL)
    for lines in sorted(rng.sample(range(8), 2)):
        kill_at(grpo, killed, lines, rng)
    resumed = grpo(killed, resume=True)
    assert steps_of(resumed) == steps_of(whole)
    assert len(steps_of(whole)) == 8
    assert adapter(resumed) == adapter(whole)
    assert (resumed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_the_run_holds_adapters_of_its_policy_and_of_its_reference(recipe: Make, tmp_path: Path) -> None:
    run = grpo(recipe(**FULL))
    checkpoint = run / "checkpoints" / "step-000008"
    policy = load_file(run / "model" / "adapter_model.safetensors")
    reference = load_file(checkpoint / "reference.safetensors")
    assert {f"base_model.model.model.{name}.weight" for name in reference} == set(policy)
    assert not any(torch.equal(policy[f"base_model.model.model.{name}.weight"], reference[name]) for name in reference)
    lm, base = luciola.load(run), luciola.load(tmp_path / "start")
    assert lm.tokenizer is not None
    assert torch.equal(lm.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(lm.model.layers[0].self_attn.o_proj.weight, base.model.layers[0].self_attn.o_proj.weight)


def test_adapters_of_a_base_that_the_run_trains_itself(recipe: Make, steps_of: Steps) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = {
        "steps": 2,
        "dtype": "float32",
        "model": {"config": shape | {"model_type": "llama"}},
        "tokenizer": {"kind": "characters", "alphabet": "012345678+=? "},
        "data": {"batch_size": 4, "sequence_length": 40},
    }
    run = grpo(recipe(base=base, lora=LORA, grpo={"steps": 2}))
    assert len(steps_of(run)) == 2
    assert str((run / "base" / "model").resolve()) in (run / "model" / "adapter_config.json").read_text()
    assert luciola.load(run).config.model_type == "llama"


def test_a_run_in_bfloat16_leaves_adapters(recipe: Make, steps_of: Steps) -> None:
    chosen = recipe(lora=LORA, grpo={"steps": 3}).model_copy(update={"dtype": "bfloat16"})
    run = grpo(chosen)
    assert all(step["kl/engine"] < 1e-2 for step in steps_of(run))
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(run / "model" / "adapter_model.safetensors").values()
    )


def test_dropout_would_be_another_policy(recipe: Make) -> None:
    with pytest.raises(ValueError, match=r"lora.dropout = 0.1 would update another policy than the one that sampled"):
        recipe(lora=LORA | {"dropout": 0.1})


def test_the_estimate_counts_the_adapters(recipe: Make) -> None:
    full, thin = describe(recipe()), describe(recipe(lora=LORA))
    assert "trained_parameters" not in full
    assert 0 < thin["trained_parameters"] < thin["parameters"] == full["parameters"]
    assert thin["memory_bytes"] < full["memory_bytes"]
