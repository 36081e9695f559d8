"""What a completion says of its end, special tokens in the text, and errors that each request has for itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from luciola.engine.engine import Engine
from luciola.engine.params import SamplingParams
from luciola.engine.sequence import Completion
from luciola.engine.stopping import StopTexts
from luciola.model.language_model import LanguageModel
from luciola.text import chat
from luciola.text.tokenizer import Tokenizer

ABC = Tokenizer.characters("abcdefghijkl")
Script = Callable[..., LanguageModel]
USER = ABC.token_id(chat.USER)
EOS = ABC.token_id(chat.EOS)


def written(script: Script, ids: list[int], **params: Any) -> Completion:
    """What a model whose only text is `ids` writes after the first of them; streamed, too."""
    engine = Engine(script(ABC, ids), dtype="model")
    settings = SamplingParams(**({"temperature": 0.0, "max_tokens": len(ids) - 1} | params))
    ((out,),) = engine.generate([ids[:1]], settings)
    assert "".join(engine.stream(ids[:1], settings)) == out.text
    return out


@pytest.mark.parametrize(
    ("params", "reason", "finish"),
    [
        ({}, None, "length"),
        ({"stop": ["fg", "de"]}, "de", "stop"),
        ({"stop": ["e", "de"]}, "de", "stop"),
        ({"stop": ["x"]}, None, "length"),
        ({"stop_token_ids": ABC.encode("fd")}, ABC.encode("d")[0], "stop"),
        ({"stop_token_ids": ABC.encode("d"), "stop": ["d"]}, ABC.encode("d")[0], "stop"),
        ({"stop_token_ids": ABC.encode("e"), "stop": ["d"]}, "d", "stop"),
    ],
)
def test_a_completion_names_what_ended_it(script: Script, params: dict[str, Any], reason: Any, finish: str) -> None:
    out = written(script, ABC.encode("abcdefghijkl"), **params)
    assert (out.stop_reason, out.finish_reason) == (reason, finish)


def test_the_end_token_is_no_reason_unless_it_is_only_a_stop_token(script: Script) -> None:
    ids = [*ABC.encode("abc"), EOS, *ABC.encode("de")]
    assert written(script, ids).stop_reason is None
    assert written(script, ids, stop_token_ids=[EOS]).stop_reason is None
    out = written(script, ids, stop_token_ids=[EOS], ignore_eos=True)
    assert (out.stop_reason, out.finish_reason) == (EOS, "stop")


def test_the_stop_text_is_the_one_that_begins_first() -> None:
    watch = StopTexts(["bcd", "cd", "d", "bc"]).watch()
    assert watch.stop is None
    assert watch.push("abcd") == "a"
    assert watch.stop == "bc"


def test_special_tokens_stay_in_the_text_where_they_are_asked_for(script: Script) -> None:
    ids = [*ABC.encode("ab"), USER, *ABC.encode("c"), EOS]
    assert written(script, ids).text == "bc"
    kept = written(script, ids, skip_special_tokens=False)
    assert (kept.text, kept.token_ids, kept.finish_reason) == (f"b{chat.USER}c", ids[1:], "stop")
    assert written(script, [*ids, *ABC.encode("de")], skip_special_tokens=False, ignore_eos=True).text == (
        f"b{chat.USER}c{chat.EOS}de"
    )


def test_a_special_stop_token_is_left_out_like_the_end_token(script: Script) -> None:
    ids = [*ABC.encode("ab"), USER, *ABC.encode("c")]
    assert written(script, ids, skip_special_tokens=False, stop_token_ids=[USER]).text == "b"
    for skip in (True, False):  # an ordinary one is text
        assert written(script, ids, skip_special_tokens=skip, stop_token_ids=ABC.encode("b")).text == "b"


def test_special_tokens_can_be_stop_texts(script: Script) -> None:
    ids = [*ABC.encode("ab"), USER, *ABC.encode("cd")]
    out = written(script, ids, skip_special_tokens=False, stop=[chat.USER])
    assert (out.text, out.stop_reason) == ("b", chat.USER)


class OddError(Exception):
    """One that cannot be made from its own arguments."""

    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("a", 3), OddError(1, b=2), OSError(12, "full")])
def test_a_step_that_fails_gives_each_request_its_own_error(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, cause = Engine(lm, dtype="model"), ValueError("the root of it")

    def fails(*arguments: Any, **more: Any) -> None:
        raise error from cause

    async def ask() -> list[Any]:
        async def one(i: int) -> None:
            async for _ in engine.stream_async([3 + i, 4], SamplingParams(max_tokens=50, ignore_eos=True)):
                pass

        return await asyncio.gather(*(one(i) for i in range(4)), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(lm.model, "decode", fails)
        patch.setattr(lm.model, "hidden", fails)
        errors = asyncio.run(ask())
    assert len({id(e) for e in errors}) == 4
    assert {str(e) for e in errors} == {str(error)}
    if not isinstance(error, OddError):
        assert {type(e) for e in errors} == {type(error)}
        assert all(e.__cause__ is cause for e in errors)
    else:
        assert all(e.__cause__ is error for e in errors)
    assert engine.blocks_used == 0
    assert len(engine.generate([[3, 4]], SamplingParams(max_tokens=3, ignore_eos=True))[0][0].token_ids) == 3


def test_stats_tell_the_blocks(lm: LanguageModel) -> None:
    engine = Engine(lm, dtype="model", max_cached_tokens=64, block_size=4)
    assert (engine.stats["blocks_total"], engine.stats["blocks_used"]) == (16, 0)
    stream = engine.stream(torch.arange(3, 12).tolist(), SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    assert engine.stats["blocks_used"] == engine.blocks_used > 0
    stream.close()  # type: ignore[attr-defined]
    assert engine.stats["blocks_used"] == 0
