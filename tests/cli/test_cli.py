"""Commands: exit codes, what is printed where, and one sentence for every failure."""

import errno
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from luciola import hardware
from luciola.cli import app
from luciola.recipe import PretrainRecipe, load
from luciola.recipe.objective import NAMES
from luciola.run import Run
from luciola.verify import own
from luciola.verify.pool import Pool

RECIPE = """
steps = 10
dtype = "float32"
[run]
name = "tiny"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[tokenizer]
kind = "characters"
alphabet = "abc"
[data]
source = "files"
paths = ["text.txt"]
"""


@pytest.fixture
def luciola(workplace: Path) -> Callable[..., Result]:
    (workplace / "tiny.toml").write_text(RECIPE)
    (workplace / "text.txt").write_text("abcabc")

    def run(*arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(app, arguments, input=stdin)

    return run


def fails(result: Result, code: int, sentence: str) -> None:
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [command.callback.__name__ for command in app.registered_commands])
def test_every_command_has_help_with_an_example(luciola: Callable[..., Result], command: str) -> None:
    result = luciola(command, "--help")
    assert result.exit_code == 0
    assert f"luciola {command}" in result.stdout
    assert "--debug" in result.stdout


def test_wrong_usage_exits_2(luciola: Callable[..., Result]) -> None:
    assert luciola("nonsense").exit_code == 2
    assert luciola("grpo").exit_code == 2
    assert luciola("grpo", "quickstart", "--nonsense").exit_code == 2
    fails(
        luciola("pretrain", "tiny.toml", "stpes=3"),
        2,
        "error: override stpes=3: unknown key stpes; did you mean steps?",
    )
    fails(luciola("pretrain", "tniy.toml"), 2, "error: no recipe tniy.toml; did you mean tiny.toml?")
    fails(luciola("grpo", "tiny.toml"), 2, "is a recipe for `luciola pretrain`")
    fails(luciola("pretrain", "tiny.toml", "model.config.hiden_size=3", "--dry-run"), 2, "did you mean hidden_size?")


def test_an_existing_run_is_named_with_the_ways_out(luciola: Callable[..., Result]) -> None:
    with Run.create(load(PretrainRecipe, "tiny.toml"), "pretrain") as run:
        run.log(1, {"loss": 1.5})
    fails(luciola("pretrain", "tiny.toml"), 1, "the run runs/tiny exists; continue it with --resume")
    run.summary({})
    fails(luciola("pretrain", "tiny.toml"), 1, "the run runs/tiny has finished (luciola chat runs/tiny)")
    fails(
        luciola("pretrain", "tiny.toml", "run.name=tony", "--resume"),
        1,
        "no run runs/tony to resume; in runs there are: tiny",
    )


def test_a_start_that_fails_leaves_its_name_free(luciola: Callable[..., Result], workplace: Path) -> None:
    missing = ("data.source=files", 'data.paths=["none.txt"]')
    fails(luciola("pretrain", "tiny.toml", *missing), 1, "none.txt does not exist")
    assert (workplace / "runs" / "tiny" / "recipe.toml").exists()
    fails(luciola("pretrain", "tiny.toml", "model.config.hiden_size=3"), 2, "did you mean hidden_size?")


def test_one_damaged_run_does_not_hide_the_others(luciola: Callable[..., Result], workplace: Path) -> None:
    for name in ("good", "bad"):
        Run.create(load(PretrainRecipe, "tiny.toml", [f"run.name={name}"]), "pretrain").close()
    (workplace / "runs" / "bad" / "recipe.toml").write_text("garbage")
    listed = [line.split() for line in luciola("runs").stdout.splitlines()]
    assert ["bad", "?", "damaged", "0/0"] in listed
    assert any(line[:3] == ["good", "pretrain", "stopped"] for line in listed)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            1,
            "error: there is no space left on the disk for runs/x",
        ),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            1,
            "error: there is no space left on the disk; make",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 1, "error: runs/x: Permission denied"),
        (ValueError("the message\nover two lines"), 1, "error: the message over two lines"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: there is not enough memory"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 1, "error: the package trl is not installed"),
        (KeyError("oops"), 1, "error: KeyError: 'oops' (this should not happen; --debug shows where it did)"),
        (KeyboardInterrupt(), 130, "stopped; continue with: luciola pretrain tiny.toml run.name=a+b --resume"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_failure_is_one_sentence(
    luciola: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def failing(recipe: PretrainRecipe, resume: bool = False) -> Path:
        raise error

    monkeypatch.setattr("luciola.train.pretrain.pretrain", failing)
    fails(luciola("pretrain", "tiny.toml", "run.name=a+b"), code, sentence)
    if code == 1:
        assert luciola("pretrain", "tiny.toml", "--debug").exception is error


def test_a_dry_run_looks_for_the_reward_functions_of_ones_own(
    luciola: Callable[..., Result], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "dry_rewards.py").write_text("def there(prompt, completion, truth): return 1.0\n")
    with Pool(size=1, seconds=20, memory_mb=own.MEMORY_MB, program=own.WORKER) as pool:
        monkeypatch.setattr(own, "_pool", lambda: pool)
        monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
        assert luciola("grpo", "quickstart", 'reward.own={"dry_rewards:there" = 1}', "--dry-run").exit_code == 0
        result = luciola("grpo", "quickstart", 'reward.own={"dry_rewards:nope" = 1}', "--dry-run")
    fails(result, 1, "the reward function 'dry_rewards:nope' cannot be used (the module dry_rewards has no nope)")
    assert "dry_rewards" not in sys.modules


def test_a_dry_run_prints_a_whole_recipe_and_starts_nothing(luciola: Callable[..., Result], workplace: Path) -> None:
    result = luciola("pretrain", "tiny.toml", "steps=7", "--dry-run")
    assert result.exit_code == 0, result.stderr
    table = tomllib.loads(result.stdout)
    assert table["steps"] == 7
    assert table["optim"]["clip_grad_norm"] == 1.0
    assert "# parameters" in result.stdout
    assert "# memory" in result.stdout
    assert not (workplace / "runs").exists()
    (workplace / "resolved.toml").write_text(result.stdout)
    assert load(PretrainRecipe, "resolved.toml") == load(PretrainRecipe, "tiny.toml", ["steps=7"])


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_can_be_tried_on_the_shipped_recipe(
    luciola: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hardware, "gemm_peak", lambda dtype: 1e12)
    result = luciola("grpo", "quickstart", f"objective.name={name}", "--dry-run")
    assert result.exit_code == 0, result.stderr
    printed = tomllib.loads(result.stdout)["objective"]
    assert printed["name"] == name
    assert NAMES[name].items() <= printed.items()


def test_the_result_of_a_run_is_a_table(luciola: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(recipe: PretrainRecipe, resume: bool = False) -> Path:
        assert resume
        after = {"accuracy": 0.9771, "problems": 400}
        with Run.create(recipe, "pretrain", resume) as run:
            run.summary({"before": {"accuracy": 0.36}, "after": after, "seconds": 12.5})
        return run.path

    monkeypatch.setattr("luciola.train.pretrain.pretrain", trained)
    Run.create(load(PretrainRecipe, "tiny.toml"), "pretrain").close()
    result = luciola("pretrain", "tiny.toml", "--resume")
    assert result.exit_code == 0
    heading, accuracy = result.stdout.splitlines()[:2]
    assert heading.split("  ")[0] == "400 held-out problems"
    assert accuracy.split() == ["accuracy", "36.0%", "97.7%"]
    assert "luciola chat runs/tiny" in result.stdout


def test_runs_are_listed_and_compared(luciola: Callable[..., Result]) -> None:
    assert "no runs in runs yet" in luciola("runs").stdout
    for name, lr in (("one", "0.1"), ("two", "0.2")):
        with Run.create(load(PretrainRecipe, "tiny.toml", [f"run.name={name}", f"optim.lr={lr}"]), "pretrain") as run:
            run.log(4, {"loss": 1.5})
    listed = luciola("runs").stdout.splitlines()
    assert listed[0].split()[:4] == ["run", "kind", "state", "step"]
    assert listed[1].split()[:5] == ["one", "pretrain", "stopped", "4/10", "1.5"]
    compared = luciola("runs", "two", "one").stdout.splitlines()
    assert [line.split() for line in compared] == [["two", "one"], ["optim.lr", "0.2", "0.1"], ["step", "4/10", "4/10"]]
    fails(luciola("runs", "three"), 1, "there is no run three in runs; there are one, two")


def test_doctor_says_what_auto_means(luciola: Callable[..., Result]) -> None:
    text = luciola("doctor")
    assert text.exit_code == 0
    assert "dtype auto" in text.stdout
    facts = json.loads(luciola("doctor", "--json").stdout)
    assert facts["cores"] >= 1
    assert facts["dtype auto"].startswith(("float32 (", "bfloat16 ("))


def test_bench_runs_what_stands_in_its_folder(
    luciola: Callable[..., Result], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "compared").mkdir()
    (workplace / "compared" / "decode_cli_test.py").write_text(
        '"""Decoding against a peer."""\nPEERS = ("peer", "other")\ndef run(against): return {against: 1.25}\n'
    )
    monkeypatch.setattr("luciola.bench.__path__", [str(workplace / "compared")])
    listed = luciola("bench", "--output", "out.json").stdout
    assert listed.startswith("decode-cli-test  Decoding against a peer.\n") and "luciola bench all" in listed
    assert "1.25" not in listed and not Path("out.json").exists()
    assert "  peer  1.25" in luciola("bench", "all", "--output", "out.json").stdout
    assert json.loads(Path("out.json").read_text()) == {"decode-cli-test": {"peer": 1.25}}
    assert "  other  1.25" in luciola("bench", "decode-cli-test", "--against", "other").stdout
    fails(luciola("bench", "nothing"), 1, "there is no comparison nothing; there are decode-cli-test")
    assert (
        "cannot be compared with nobody; it knows peer, other" in luciola("bench", "all", "--against", "nobody").stderr
    )
    several = luciola("bench", "all", "--against", "other,peer", "--output", "out.json").stdout
    assert "  peer.peer    1.25" in several
    assert json.loads(Path("out.json").read_text()) == {
        "decode-cli-test": {"other": {"other": 1.25}, "peer": {"peer": 1.25}}
    }


def test_of_several_peers_a_comparison_runs_those_it_has() -> None:
    from luciola.cli.look import _peers

    known = {"decode": ("transformers", "llama.cpp"), "grpo": ("trl",), "cache": ()}
    assert _peers(known, None) == {"decode": ("transformers",), "grpo": ("trl",), "cache": ()}
    assert _peers(known, "trl, llama.cpp") == {"decode": ("llama.cpp",), "grpo": ("trl",), "cache": ()}
    with pytest.raises(ValueError, match=r"grpo cannot be compared with transformers, llama.cpp; it knows trl"):
        _peers(known, "transformers,llama.cpp")
    with pytest.raises(ValueError, match=r"decode cannot be compared with nobody; it knows transformers, llama.cpp"):
        _peers(known, "trl,llama.cpp,nobody")
    assert _peers({"cache": ()}, "trl") == {"cache": ()}
    assert _peers({"grpo": ("trl",)}, "trl,") == {"grpo": ("trl",)}
    for nobody in (",", "", " , "):
        with pytest.raises(ValueError, match=f"--against '{nobody}' names nobody; give a peer"):
            _peers(known, nobody)


def test_the_version_is_printed(luciola: Callable[..., Result]) -> None:
    result = luciola("--version")
    assert result.exit_code == 0
    assert result.stdout[0].isdigit()
