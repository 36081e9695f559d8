"""generate, evaluate and chat with a tiny random model, and the showing of thoughts with scripted replies."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.cli.chat import Conversation, show, split

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import luciola
    from luciola.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.characters("0123456789+-= ?Whatisplumn.")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    luciola.LanguageModel.create(CONFIG | {"vocab_size": tokenizer.vocab_size}, tokenizer, seed=0).save(folder)
    return str(folder)


def luciola_says(*arguments: str, stdin: str = "") -> Result:
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == 0, result.output
    return result


def test_generate_continues_an_argument_or_its_input(model: str) -> None:
    options = ("--max-tokens", "8", "--seed", "3", "--dtype", "float32")
    first = luciola_says("generate", model, "1+1", *options).stdout
    assert first == luciola_says("generate", model, *options, stdin="1+1").stdout
    assert len(luciola_says("generate", model, "1+1", *options, "-n", "3").stdout.split("\n---\n")) == 3
    assert luciola_says("generate", model, "1+1", "--chat", *options).stdout != ""


def test_generate_names_a_model_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["generate", "nowhere", "1+1"])
    assert result.exit_code == 1
    assert "nowhere does not exist" in result.stderr


def test_evaluate_scores_a_text(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import luciola

    path = tmp_path / "text"
    path.write_text("What is 1+1? " * 30)
    options = ("evaluate", model, "--perplexity", str(path), "--dtype", "float32")
    scored = json.loads(luciola_says(*options, "--json").stdout)
    assert list(scored) == ["float32"] and scored["float32"]["tokens"] == 13 * 30 - 1
    assert luciola_says(*options).stdout.splitlines()[1].split()[0] == "perplexity"

    class Rounding(luciola.Engine):
        """An engine whose quantised weights are rounded to a hundredth."""

        def __init__(self, lm: Any, dtype: str, quantize: str | None = None) -> None:
            super().__init__(lm, dtype)
            if quantize is not None:
                self.model = copy.deepcopy(self.model)
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.mul(100).round().div(100)

    monkeypatch.setattr("luciola.engine.engine.Engine", Rounding)
    both = json.loads(luciola_says(*options, "--quantize", "int8", "--json").stdout)
    assert both["float32"] == scored["float32"]
    expected = both["int8"]["perplexity"] / both["float32"]["perplexity"] - 1
    assert both["change"]["perplexity"] == pytest.approx(expected) and expected != 0
    heading, line = luciola_says(*options, "--quantize", "int8").stdout.splitlines()[:2]
    assert heading.split() == ["float32", "int8", "change"] and line.split()[-1] == f"{expected:+.2%}"


def test_evaluate_names_what_does_not_go_with_a_text(model: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    for content, options, sentence in (
        (None, ("--perplexity", str(path)), "No such file"),
        (b"", ("--perplexity", str(path)), "is empty; give a text"),
        (b"a\xff", ("--perplexity", str(path)), "is not UTF-8 text (byte 1)"),
        (b"1+1", ("--perplexity", str(path), "--window", "97"), "window=97 must be between 2 and the model's context"),
        (b"1+1", ("task.name=countdown", "--perplexity", str(path)), "task.name=countdown is a task setting"),
        (b"1+1", ("--quantize", "int8"), "--quantize goes with --perplexity FILE"),
        (b"1+1", ("--window", "8"), "--window goes with --perplexity FILE"),
    ):
        if content is not None:
            path.write_bytes(content)
        result = CliRunner().invoke(app, ["evaluate", model, *options, "--dtype", "float32"])
        assert result.exit_code == 1 and sentence in result.stderr, result.output


def test_evaluate_takes_the_task_from_overrides_or_the_run(model: str, tmp_path: Path) -> None:
    options = ("--problems", "4", "--samples", "2", "--max-tokens", "4", "--json", "--dtype", "float32")
    named = json.loads(luciola_says("evaluate", model, "task.name=arithmetic", "task.max_digits=1", *options).stdout)
    assert named["problems"] == 4
    assert named["verdicts"]["no_answer"] == 12
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(model)
    (run / "recipe.toml").write_text('[task]\nname = "arithmetic"\nmax_digits = 1\n')
    kept = json.loads(luciola_says("evaluate", str(run), *options).stdout)
    assert {**named, "seconds": 0} == {**kept, "seconds": 0}
    for overrides, sentence in [
        ((), "name one, for example task.name=arithmetic"),
        (["task.name=arith"], "did you mean"),
    ]:
        result = CliRunner().invoke(app, ["evaluate", model, *overrides])
        assert result.exit_code == 2
        assert sentence in result.stderr


def test_chat_through_a_pipe_answers_line_by_line(model: str) -> None:
    result = luciola_says("chat", model, "--max-tokens", "5", "--seed", "1", stdin="1+1\n\n/reset\n1+1\n")
    first, second = result.stdout.splitlines()
    assert first == second, "the second turn starts from nothing again"


class Scripted:
    """Stands for tokenizer and engine: prompts are plain text, replies come from a list, character by character."""

    def __init__(self, replies: Sequence[str], opening: str = "") -> None:
        self.replies, self.opening = list(replies), opening
        self.prompts: list[str] = []

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + self.opening

    def encode(self, prompt: str) -> str:
        return prompt

    def stream(self, prompt: str, params: Any) -> Iterator[str]:
        self.prompts.append(prompt)
        yield from self.replies.pop(0)


def conversation(script: Scripted, **options: Any) -> Conversation:
    return Conversation(SimpleNamespace(tokenizer=script), script, None, **options)  # type: ignore[arg-type]


def test_a_conversation_remembers_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    script = Scripted(["<think>a</think>yes", "no", "maybe"])
    talk = conversation(script, system="Be brief.")
    for text in ("one", "two"):
        talk.reply(text)
    talk.reset()
    talk.reply("three")
    assert script.prompts == [
        "<system>Be brief.<user>one",
        "<system>Be brief.<user>one<assistant><think>a</think>yes<user>two",
        "<system>Be brief.<user>three",
    ]
    assert capsys.readouterr().out == "<think>a</think>yes\nno\nmaybe\n", "a pipe gets replies as they were written"


def test_a_turn_that_is_broken_off_is_forgotten() -> None:
    script = Scripted(["never ends", "fine"])
    talk = conversation(script)
    stream = script.stream

    def interrupted(prompt: str, params: Any) -> Iterator[str]:
        yield "nev"
        raise KeyboardInterrupt

    script.stream = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        talk.reply("one")
    script.stream = stream  # type: ignore[method-assign]
    talk.reply("two")
    assert script.prompts == ["<user>two"]


def test_thinking_opened_by_the_template_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(Scripted(["hm</think>\n\n42"], opening="<assistant><think>\n"), hide_thinking=True)
    talk.reply("6*7?")
    assert capsys.readouterr().out == "42\n"
    assert talk.messages[-1]["content"] == "<think>hm</think>\n\n42"


def test_a_terminal_shows_thinking_dim(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    show(["<think>\nhm", " hm</think>\n<answer>4", "2</answer>"], inside=False, hide_thinking=False)
    assert capsys.readouterr().out == "\033[2mhm\033[0m\033[2m hm\033[0m\n\n42\n"


PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", "<", "</", "th", "ink>", " 1 < 2"])
)


@given(PARTS, st.randoms(use_true_random=False))
def test_splitting_does_not_depend_on_how_a_reply_arrives(parts: list[str], random: Any) -> None:
    text = "".join(parts)
    cuts = sorted(random.sample(range(len(text) + 1), k=min(3, len(text))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def joined(parts: Callable[[], Iterator[tuple[bool, str]]]) -> list[tuple[bool, str]]:
        runs: list[tuple[bool, str]] = []
        for inside, piece in parts():
            runs = (
                [*runs[:-1], (inside, runs[-1][1] + piece)]
                if runs and runs[-1][0] == inside
                else [*runs, (inside, piece)]
            )
        return runs

    assert joined(lambda: split(pieces, False)) == joined(lambda: split([text], False))


def test_markup_parts_thinking_from_answer() -> None:
    assert list(split(["<think>3 < 4</think><answer>yes</answer>"], False)) == [(True, "3 < 4"), (False, "yes")]
    assert list(split(["so</think>yes"], True)) == [(True, "so"), (False, "yes")]
    assert list(split(["a <thin"], False)) == [(False, "a "), (False, "<thin")]
