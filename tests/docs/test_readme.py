"""What the README and docs/ show works: commands run, Python runs, recipes are valid, links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from luciola.cli import app
from luciola.recipe import ObjectiveSection, RewardSection
from luciola.tasks import TaskConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINS = {"quickstart", "pretrain", "sft", "grpo", "r1"}  # minutes each: shown what they would do instead

SECTIONS: dict[str, Any] = {"task": TaskConfig, "objective": ObjectiveSection, "reward": RewardSection}

TINY = ["base.steps=2", "base.data.batch_size=4", "grpo.steps=1", "rollout.prompts=2", "rollout.group_size=2"]
TINY += ["evaluate.problems=4", "evaluate.samples=1"]


def blocks(language: str) -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    for block in blocks("bash"):
        for line in block.splitlines():
            if line.startswith("luciola "):
                yield line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipes and a run named quickstart, small enough for a test."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, ["quickstart", *TINY])
        assert result.exit_code == 0, result.stderr
        assert "luciola chat runs/quickstart" in result.stdout
        (folder / "book.txt").write_text("Once upon a time there was a firefly.\n" * 200)
        turns = [{"role": "user", "content": "What is gravity?"}, {"role": "assistant", "content": "A pull."}]
        (folder / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        yield folder


@pytest.mark.parametrize("line", list(commands()))
def test_commands_run(line: str, workplace: Path) -> None:
    words = shlex.split(line, comments=True)[1:]
    for earlier in commands():  # what it reads may be made by a line above, and another process may have run that
        if earlier == line:
            break
        made = shlex.split(earlier, comments=True)[1:]
        if made[0] == "convert" and made[2] in words and not Path(made[2]).exists():
            assert CliRunner().invoke(app, made).exit_code == 0
    if words[0] == "serve":
        serves(words)
        return
    if words[0] in TRAINS and "--dry-run" not in words:
        words.append("--dry-run")
    if words[0] == "evaluate":
        words += ["--problems", "4"]
    result = CliRunner().invoke(app, words, input="12+34\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def serves(words: list[str]) -> None:
    """It answers a question, hands out the page, and ends when told."""
    command = [sys.executable, "-m", "luciola", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://[0-9.:]+", process.stdout.readline())
        try:
            assert address
            body = {"messages": [{"role": "user", "content": "What is 186 + 357?"}], "max_tokens": 64}
            reply = httpx.post(f"{address[0]}/v1/chat/completions", json=body, timeout=60).json()
            assert reply["usage"]["completion_tokens"] > 0
            assert "<title>" in httpx.get(address[0]).text
        finally:
            process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("toml"))
def test_recipes_are_valid(block: str, workplace: Path) -> None:
    (workplace / "gsm8k_train.jsonl").write_text('{"question": "1+1?", "answer": "It is 2.\\n#### 2"}\n')
    sections = tomllib.loads(block)
    assert sections.keys() <= SECTIONS.keys()
    for name, section in sections.items():
        TypeAdapter(SECTIONS[name]).validate_python(section)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "labnotes").glob("*.md"))], ids=lambda page: page.name)
def test_no_figure_is_left_out(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
