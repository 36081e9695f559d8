"""generate, evaluate and chat with a tiny random model, and the showing of thoughts with scripted replies."""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from luciola.cli import app
from luciola.cli.ask import as_options
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


def test_an_empty_input_is_named_without_a_number(model: str) -> None:
    result = CliRunner().invoke(app, ["generate", model], input="")
    assert result.exit_code == 1
    assert result.stderr == "error: the prompt is empty; give a text, as an argument or on standard input\n"


def test_a_schema_may_come_through_a_pipe(model: str) -> None:
    options = ("--max-tokens", "60", "--seed", "1", "--dtype", "float32")
    for content, code, expected in (('{"const": 121}', 0, "121\n"), ("[1]", 1, "must hold a JSON object")):
        reader, writer = os.pipe()
        os.write(writer, content.encode())
        os.close(writer)
        try:
            result = CliRunner().invoke(app, ["generate", model, "1+1", "--schema", f"/dev/fd/{reader}", *options])
        finally:
            os.close(reader)
        assert result.exit_code == code, result.output
        assert expected in (result.stderr if code else result.stdout)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--temperature", "nan"), 2, "Invalid value for '--temperature': nan is not 0 or a finite positive number"),
        (("--temperature", "inf"), 2, "inf is not 0 or a finite positive number"),
        (("--temperature", "-1"), 2, "-1.0 is not 0 or a finite positive number"),
        (("--top-p", "0"), 2, "Invalid value for '--top-p': 0.0 is not above 0 and at most 1"),
        (("--top-p", "nan"), 2, "nan is not above 0 and at most 1"),
        (("--stop", "a", "--stop", ""), 2, "Invalid value for '--stop': it is empty; give the text that ends"),
        (("--quantize", "int3"), 2, "'int3' is not one of int8, int4, keep"),
        (("--speculate", "magic"), 2, "'magic' is not one of mtp, ngram"),
        (("--dtype", "float8"), 2, "'float8' is not one of auto, float32, bfloat16"),
        (("--speculate", "mtp"), 1, "error: --speculate 'mtp' needs a multi-token prediction module"),
        (("--min-tokens", "9", "--max-tokens", "8"), 1, "error: --min-tokens 9 must be at most --max-tokens 8"),
        (("--top-k", str(2**63)), 1, f"error: --top-k {2**63} must be 0 (all tokens) or a whole number"),
        (("--repetition-penalty", "1e7"), 1, "error: --repetition-penalty 10000000.0 must be between 0.01 and"),
        (("--logprobs", "99"), 1, "error: --logprobs 99 must be at most the vocabulary's size"),
        (("--group-size", "64"), 1, "error: --group-size 64 goes with --quantize 'int8' or 'int4'"),
        (("--group-size", "48", "--quantize", "int8"), 1, "error: --group-size 48 must be one of 32, 64, 128"),
        (("--parity", "--quantize", "int8"), 1, "error: --parity needs float32 weights on a CPU, not quantised"),
        (("--max-cached-tokens", str(10**15)), 1, f"error: --max-cached-tokens {10**15} needs more memory"),
        (("--max-cached-tokens", "1"), 1, "give the engine more --max-cached-tokens"),
        (("--quantize", "keep"), 1, "has no matrices in Q8_0, Q4_0 or Q4_1 to keep; int8 and int4 make some"),
    ],
)
def test_errors_name_the_option(model: str, options: tuple[str, ...], code: int, sentence: str) -> None:
    result = CliRunner().invoke(app, ["generate", model, "1+1=2+0=0+2" * 2, "--dtype", "float32", *options])
    assert result.exit_code == code, result.output
    assert sentence in " ".join(result.stderr.replace("\u2502", " ").split())


def test_errors_leave_words_and_texts_of_the_user_as_they_are() -> None:
    for before, after in (
        ("max_tokens=3 must be", "--max-tokens 3 must be"),
        ("give parity=True, or more max_cached_tokens", "give --parity, or more --max-cached-tokens"),
        ("the stop texts of n samples at a temperature", "the stop texts of n samples at a temperature"),
        ("override task.seed=3 of a_min_tokens", "override task.seed=3 of a_min_tokens"),
        ("top_logprobs=3 and n=2", "--logprobs 3 and -n 2"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(after)}$"), as_options():
            raise ValueError(before)


def test_generate_writes_at_least_so_many_tokens_and_exactly_those_of_the_full_pass(model: str) -> None:
    import torch

    import luciola

    lm = luciola.load(model)
    options = ("--min-tokens", "6", "--max-tokens", "6", "--parity", "--dtype", "float32", "--temperature", "1")
    said = luciola_says("generate", model, "1+1", *options, "-n", "2", "--seed", "5", "--logprobs", "3").stdout
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["completion"] for line in lines] == [0] * 6 + [1] * 6
    prompt = lm.tokenizer.encode("1+1")
    for number in range(2):
        found = [line for line in lines if line["completion"] == number]
        row = torch.tensor([prompt + [line["id"] for line in found]])
        logp = lm.model.exact_logits(row)[0, len(prompt) - 1 : -1].log_softmax(-1)
        for line, logp_V in zip(found, logp, strict=True):
            assert line["text"] == lm.tokenizer.decode([line["id"]], skip_special_tokens=False)
            assert line["logprob"] == pytest.approx(float(logp_V[line["id"]]), abs=1e-5)
            assert [x["id"] for x in line["likeliest"]] == logp_V.topk(3).indices.tolist()
            assert [x["logprob"] for x in line["likeliest"]] == pytest.approx(logp_V.topk(3).values.tolist(), abs=1e-5)
    plain = luciola_says("generate", model, "1+1", *options, "--seed", "5", "--logprobs", "0").stdout.splitlines()
    assert [json.loads(line) for line in plain] == [line | {"likeliest": []} for line in lines[:6]]


def test_generate_tells_what_speculation_and_grammars_did(model: str) -> None:
    options = ("--dtype", "float32", "--max-tokens", "40", "--temperature", "0", "--min-tokens", "40")
    text = luciola_says("generate", model, "1+1", *options)
    fast = luciola_says("generate", model, "1+1", *options, "--speculate", "ngram")
    assert fast.stdout == text.stdout and text.stderr == ""
    told = re.fullmatch(r"40 tokens, [\d.]+ tokens/s, (\d+) % of (\d+) drafted tokens accepted\n", fast.stderr)
    assert told and 0 <= int(told[1]) <= 100 and int(told[2]) > 0, fast.stderr
    kept = luciola_says("generate", model, "1+1", "--dtype", "float32", "--regex", "[0-9]{12}", "-n", "2")
    assert re.fullmatch(r"\d{12}\n---\n\d{12}\n", kept.stdout)
    assert re.fullmatch(r"24 tokens, [\d.]+ tokens/s, \d+ microseconds of grammar a token\n", kept.stderr)


@pytest.fixture(scope="module")
def in_eight_bits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GGUF file with matrices in Q8_0."""
    import luciola
    from luciola.text.tokenizer import Tokenizer

    tokenizer, folder = Tokenizer.characters("0123456789+-= ?Whatisplumn."), tmp_path_factory.mktemp("quantised")
    shape = CONFIG | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": tokenizer.vocab_size}
    luciola.LanguageModel.create(shape, tokenizer, seed=0).save(folder / "whole")
    luciola_says("convert", str(folder / "whole"), str(folder / "model.gguf"), "--dtype", "q8_0")
    return str(folder / "model.gguf")


def test_a_file_in_eight_bits_can_be_used_as_it_is(
    in_eight_bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luciola.engine.engine import Engine
    from luciola.model.quant_layers import is_quantised

    made = []

    class Watched(Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("luciola.engine.engine.Engine", Watched)
    options = ("--dtype", "float32", "--max-tokens", "12", "--temperature", "0")
    floats = luciola_says("generate", in_eight_bits, "1+1", *options).stdout
    assert luciola_says("generate", in_eight_bits, "1+1", *options, "--quantize", "keep").stdout == floats
    luciola_says("chat", in_eight_bits, *options, "--quantize", "keep", stdin="1+1\n")
    short = ("--problems", "2", "--samples", "0", "--max-tokens", "4", "--json", "--dtype", "float32")
    luciola_says("evaluate", in_eight_bits, "task.name=arithmetic", *short, "--quantize", "keep")
    text = tmp_path / "text"
    text.write_text("What is 1+1? " * 20)
    scored = ("evaluate", in_eight_bits, "--perplexity", str(text), "--dtype", "float32", "--json")
    before = json.loads(luciola_says(*scored).stdout)["float32"]
    kept = json.loads(luciola_says(*scored, "--quantize", "keep").stdout)
    assert list(kept) == ["keep"] and kept["keep"]["loss"] == pytest.approx(before["loss"], abs=1e-4)
    assert [is_quantised(engine.model) for engine in made] == [False, True, True, True, False, True]


def test_group_sizes_can_be_asked_for(model: str, in_eight_bits: str, tmp_path: Path, monkeypatch: Any) -> None:
    from luciola.engine.engine import Engine
    from luciola.model.quant_layers import QuantLinear

    groups = []

    class Watched(Engine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            groups.append({m.weight.group for m in self.model.modules() if isinstance(m, QuantLinear)})

    monkeypatch.setattr("luciola.engine.engine.Engine", Watched)
    common = ("--dtype", "float32", "--max-tokens", "4", "--quantize", "int4", "--group-size", "128")
    luciola_says("generate", in_eight_bits, "1+1", *common)
    luciola_says("chat", in_eight_bits, *common, stdin="1+1\n")
    luciola_says("evaluate", in_eight_bits, "task.name=arithmetic", "--problems", "2", "--samples", "0", *common)
    text = tmp_path / "text"
    text.write_text("What is 1+1? " * 20)
    luciola_says("evaluate", in_eight_bits, "--perplexity", str(text), *common)
    assert groups == [{128}, {128}, {128}, set(), {128}]


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

        def __init__(self, lm: Any, dtype: str, quantize: str | None = None, group_size: int = 32) -> None:
            super().__init__(lm, dtype)
            if quantize is not None:
                self._weights.model = copy.deepcopy(self.model)
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.mul(100).round().div(100)

    monkeypatch.setattr("luciola.engine.engine.Engine", Rounding)
    both = json.loads(luciola_says(*options, "--quantize", "int8", "--json").stdout)
    assert both["float32"] == scored["float32"]
    expected = both["int8"]["perplexity"] / both["float32"]["perplexity"] - 1
    assert both["change"]["perplexity"] == pytest.approx(expected) and expected != 0
    heading, line = luciola_says(*options, "--quantize", "int8").stdout.splitlines()[:2]
    assert heading.split() == ["float32", "int8", "change"] and line.split()[-1] == f"{expected:+.2%}"


def test_evaluate_counts_characters_that_the_tokenizer_does_not_have(model: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    for text, unknown in (("What is 1+1? ", 0), ("What ist 1+1 &\n&\n", 4)):
        path.write_text(text)
        result = luciola_says("evaluate", model, "--perplexity", str(path), "--dtype", "float32", "--json")
        assert json.loads(result.stdout)["float32"]["unknown_characters"] == unknown
        assert (f"does not have {unknown} of the {len(text)} characters of {path}" in result.stderr) == (unknown > 0)
        assert ("warning" in result.stderr) == (unknown > 0)


def test_evaluate_names_what_does_not_go_with_a_text(model: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    for content, options, sentence in (
        (None, ("--perplexity", str(path)), "No such file"),
        (b"", ("--perplexity", str(path)), "is empty; give a text"),
        (b"a\xff", ("--perplexity", str(path)), "is not UTF-8 text (byte 1)"),
        (
            b"1+1",
            ("--perplexity", str(path), "--window", "97"),
            "--window 97 must be between 2 and the model's",
        ),
        (b"1+1", ("task.name=countdown", "--perplexity", str(path)), "task.name=countdown belongs to a task"),
        (b"1+1", ("--perplexity", str(path), "--group-size", "64"), "--group-size 64 goes with --quantize 'int8' or"),
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
