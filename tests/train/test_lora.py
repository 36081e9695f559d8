"""Fine-tuning of adapters: only they are trained and kept; killed runs go on bit for bit, with the same base alone."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import luciola
from luciola.cli import app
from luciola.model.lora import targets
from luciola.recipe import LoraSection, PretrainRecipe, SftRecipe, check
from luciola.train.pretrain import pretrain
from luciola.train.sft import describe, sft

Make = Callable[..., PretrainRecipe]
Steps = Callable[[Path], list[dict[str, Any]]]
Tune = Callable[..., SftRecipe]
RANK = {"rank": 2, "alpha": 4.0}


@pytest.fixture
def base(recipe: Make) -> Path:
    return pretrain(recipe("base", steps=1))


@pytest.fixture
def tuning(recipe: Make, base: Path) -> Tune:
    """`tuning(name, lora={...}, key=value ...)`: a short fine-tuning of the base."""

    def make(name: str, lora: dict[str, Any] | None = None, **changes: Any) -> SftRecipe:
        settings = recipe(name).model_dump(include={"run", "task", "steps", "dtype", "accumulate", "optim"})
        more = {"model": {"path": str(base)}, "data": {"batch_size": 3, "sequence_length": 80}}
        adapters = {} if lora is None else {"lora": RANK | lora}
        return check(SftRecipe, settings | more | adapters | changes, "test")

    return make


def adapter(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


def adapted_modules(base: Path) -> list[str]:
    return list(targets(luciola.load(base).model, LoraSection(**RANK)))


def test_full_fine_tuning_is_the_default(tuning: Tune) -> None:
    assert tuning("full").lora is None
    run = sft(tuning("full", steps=1))
    assert (run / "model" / "model.safetensors").exists()
    assert not (run / "model" / "adapter_config.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_and_the_base_stays_bit_for_bit(tuning: Tune, base: Path, steps_of: Steps, dtype: str) -> None:
    """Biases of the router and the prediction module are the base's too."""
    before = {path: path.read_bytes() for path in sorted((base / "model").iterdir())}
    run = sft(tuning("run", lora={}, steps=30, dtype=dtype, bias_update_speed=0.1, mtp_weight=0.3))
    losses = [step["loss"] for step in steps_of(run)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert before == {path: path.read_bytes() for path in sorted((base / "model").iterdir())}
    plain, adapted = (luciola.load(path).model for path in (base, run))
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])}
    assert moved == {f"{name}.weight" for name in adapted_modules(base)}


def test_the_run_holds_adapters_alone(tuning: Tune, base: Path) -> None:
    """Model and checkpoint have A, B and their moments, and name the base where it can be found from anywhere."""
    run = sft(tuning("run", lora={}, steps=3))
    modules = adapted_modules(base)
    saved = load_file(run / "model" / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.model.{name}.lora_{part}.weight" for name in modules for part in "AB"}
    checkpoint = run / "checkpoints" / "step-000003"
    kept = load_file(checkpoint / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in kept} == {f"{name}.lora_{part}" for name in modules for part in "AB"}
    assert json.loads((checkpoint / "state.json").read_text())["base"]["path"] == str((base / "model").resolve())
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((base / "model").resolve())
    assert [path.name for path in sorted((run / "model").iterdir())] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.2, "rslora": True}], ids=["plain", "dropout"])
def test_a_killed_run_ends_as_if_it_had_never_stopped(
    tuning: Tune, kill_at: Callable[..., int], steps_of: Steps, lora: dict[str, Any]
) -> None:
    """What dropout drew is drawn again."""
    whole = sft(tuning("whole", lora=lora))
    for lines in (4, 8):
        kill_at(sft, tuning("killed", lora=lora), lines, random.Random(lines))
    resumed = sft(tuning("killed", lora=lora), resume=True)
    assert steps_of(resumed) == steps_of(whole)
    assert adapter(resumed) == adapter(whole)
    if lora:
        other = sft(tuning("other", lora=lora | {"dropout": 0.0}))
        assert adapter(other) != adapter(whole), "dropout does something"


def test_recomputing_activations_changes_nothing(tuning: Tune, steps_of: Steps) -> None:
    """Also with dropout, which must drop the same twice."""
    lora = {"dropout": 0.2}
    runs = [sft(tuning(f"{on}", lora=lora, steps=4, activation_checkpointing=on)) for on in (False, True)]
    assert adapter(runs[0]) == adapter(runs[1])


def test_another_base_under_a_checkpoint_is_refused(tuning: Tune, base: Path) -> None:
    """Even where what changed is no matrix with an adapter."""
    run = sft(tuning("run", lora={}, steps=3))
    (run / "summary.json").unlink()
    file = base / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the base model .*base/model is not the one that the adapters in .* trained on"
    ):
        sft(tuning("run", lora={}, steps=3), resume=True)


def test_the_estimate_counts_the_adapters(tuning: Tune) -> None:
    full, thin = describe(tuning("full")), describe(tuning("thin", lora={}))
    assert "trained_parameters" not in full
    trained = load_file(sft(tuning("thin", lora={}, steps=1)) / "model" / "adapter_model.safetensors")
    assert thin["trained_parameters"] == sum(tensor.numel() for tensor in trained.values())
    assert thin["parameters"] == full["parameters"]
    assert thin["memory_bytes"] < full["memory_bytes"]


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 0}, "lora.rank"),
        ({"alpha": -1.0}, "lora.alpha"),
        ({"dropout": 1.0}, "lora.dropout"),
        ({"target_modules": []}, "lora.target_modules"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tuning: Tune, lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tuning("wrong", lora=lora)


def test_a_target_that_is_not_there_is_refused_before_anything_is_trained(tuning: Tune) -> None:
    with pytest.raises(ValueError, match=r"lora.target_modules names 'q_porj'.* this model has down_proj"):
        sft(tuning("wrong", lora={"target_modules": ["q_porj"]}))


def test_commands_take_a_run_of_adapters(tuning: Tune, tmp_path: Path) -> None:
    """generate and evaluate read it, convert writes the merged model, which says the same."""
    run = sft(tuning("run", lora={}, steps=3))
    plain = ("--max-tokens", "8", "--seed", "3", "--dtype", "float32")

    def says(*arguments: str | Path) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    generated = says("generate", run, "1+1", *plain)
    says("convert", run, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert says("generate", tmp_path / "merged", "1+1", *plain) == generated
    tokens = torch.tensor([[3, 4, 5]])
    logits = [luciola.load(path).model(tokens) for path in (run, tmp_path / "merged")]
    assert torch.equal(*logits)
    assert "pass@1" in says("evaluate", run, "--problems", "4", "--samples", "2", "--max-tokens", "4")
    assert "by LoRA" in says("inspect", run)
