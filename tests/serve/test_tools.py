"""Tools: every call that a grammar lets a model complete is well formed, and no text is lost in a stream."""

import json
import re
import time
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luciola.engine.engine import Engine
from luciola.engine.grammar import Grammar, GrammarCompiler
from luciola.engine.params import SamplingParams
from luciola.model.language_model import LanguageModel
from luciola.serve.reasoning import ReasoningSplitter
from luciola.serve.tool_calls import CallPiece, SpecialTokenFilter, ToolCallParser
from luciola.serve.tool_formats import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    HERMES,
    LLAMA_3,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_TEKKEN,
    CallFormat,
)
from luciola.serve.tool_prompts import ToolPrompts
from luciola.serve.tools import ToolUse
from luciola.text.bpe import train_bpe
from luciola.text.tokenizer import Tokenizer

FORMATS = {
    "hermes": HERMES, "deepseek-v3": DEEPSEEK_V3, "deepseek-v3.1": DEEPSEEK_V3_1, "llama-3": LLAMA_3,
    "mistral": MISTRAL, "mistral-tekken": MISTRAL_TEKKEN, "mistral-args": MISTRAL_ARGS,
}  # fmt: skip
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())


def function(name: str, parameters: object = None, **further: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **further}}


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["°C", "F"]},
        "where": {"$ref": "#/$defs/place"},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    },
    "required": ["city", "unit", "where"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [function("weather", WEATHER), function("now"), function("now_in", {"properties": {"y": {"const": True}}})]
SCHEMAS = {"weather": WEATHER, "now": {"maxProperties": 0}, "now_in": {"properties": {"y": {"const": True}}}}


# The request


@pytest.mark.parametrize(
    ("request_fields", "sentence"),
    [
        ({"tools": {}}, "tools must be a list"),
        ({"tools": "x"}, "tools must be a list"),
        ({"tools": [3]}, "tools[0] must be an object"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function must be an object"),
        ({"tools": [function("a b")]}, "tools[0].function.name must be 1 to 64"),
        ({"tools": [function("a"), function("é")]}, "tools[1].function.name"),
        ({"tools": [function("a" * 65)]}, "tools[0].function.name"),
        ({"tools": [function("a\n")]}, "tools[0].function.name"),
        ({"tools": [function("a"), function("a")]}, "'a' is taken already"),
        ({"tools": [function("a", {"type": "string"})]}, "tools[0].function.parameters must be the JSON schema"),
        ({"tools": [function("a", [])]}, "tools[0].function.parameters must be"),
        ({"tools": [function("a", description=3)]}, "description must be text"),
        ({"tools": [function("a", strict="yes")]}, "strict must be true or false"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "at most 128"),
        ({"tools": [function("a")], "parallel_tool_calls": 1}, "parallel_tool_calls must be"),
        ({"tools": [function("a")], "tool_choice": "any"}, "tool_choice must be"),
        ({"tools": [function("a")], "tool_choice": {"type": "function"}}, "tool_choice must be"),
        ({"tools": [function("a")], "tool_choice": function("b")}, "tool_choice names 'b'"),
        ({"tools": [], "tool_choice": "required"}, "tools is empty"),
    ],
)
def test_requests_that_make_no_sense_are_refused_in_one_sentence(request_fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        ToolUse.read(**request_fields)
    assert "\n" not in str(refused.value)


def test_what_a_request_allows() -> None:
    assert ToolUse.read(None) is None and ToolUse.read([], "auto") is None and ToolUse.read(TOOLS, "none") is None
    auto, required, named = (ToolUse.read(TOOLS, choice) for choice in (None, "required", function("now")))
    assert auto and required and named
    assert (auto.required, required.required, named.required) == (False, True, True)
    assert [tool.name for tool in named.tools] == ["now"]
    assert len(named.given) == 3 and auto.parallel
    some = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [function("now"), function("now_in")]},
    }
    allowed = ToolUse.read(TOOLS, some)
    assert allowed and [tool.name for tool in allowed.tools] == ["now", "now_in"] and allowed.required
    assert allowed.parallel and len(allowed.given) == 3
    once = ToolUse.read(TOOLS, "auto", False)
    assert once and not once.parallel


@pytest.mark.parametrize(
    ("parameters", "strict", "sentence"),
    [
        ({"properties": {"a": {"type": "foo"}}}, False, "Invalid type: foo"),
        ({"x-guidance": {}}, False, "x-guidance"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, True, "uniqueItems"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, False, None),
    ],
)
def test_schemas_that_cannot_be_enforced(parameters: dict[str, Any], strict: bool, sentence: str | None) -> None:
    use = ToolUse.read([function("now"), function("bad", parameters, strict=strict)])
    assert use
    tokenizer = Tokenizer.characters("ab")
    if sentence is None:
        use.grammar(HERMES, tokenizer)
        return
    with pytest.raises(
        ValueError, match="^tools: the parameters of 'bad' cannot be used: .*" + re.escape(sentence)
    ) as refused:
        use.grammar(HERMES, tokenizer)
    assert "\n" not in str(refused.value)


# The grammar: whatever a model wants, here noise, what it completes are calls of the tools.


def vocabulary(kind: str, form: CallFormat) -> Tokenizer:
    """With the markup as tokens, special ones in Mistral's case, as their tokenizers have them."""
    marks = re.findall(r"<[^<>]+>|\[[A-Z_]+\]", form.write([("", "")]))
    if kind == "bpe":
        texts = [form.write([("weather", '{"city": "a", "unit": "°C", "where": {"x": 1}}'), ("now", "{}")]), "hi {a}"]
        tokenizer = train_bpe(texts * 5, 350)
    else:
        alphabet = "".join(map(chr, range(32, 127))) + "\n°｜▁"
        tokenizer = Tokenizer.characters(alphabet, added_tokens=("</think>", *marks) if kind == "tokens" else ())
    if form.marker == "[TOOL_CALLS]":
        tokenizer.backend.add_special_tokens(marks)
        return Tokenizer(tokenizer.backend, eos_token="<｜end▁of▁sentence｜>")
    return tokenizer


def completion(
    grammar: Grammar, form: CallFormat, tokenizer: Tokenizer, seed: int, begin: str = "", after: str = ""
) -> str:
    """A text that ends, drawn at random among what the grammar allows behind `begin`."""
    state = compiler(tokenizer).start(grammar.after(after) if after else grammar)
    ids = tokenizer.encode(begin)
    for token in ids:
        state.accept(token)
    generator = torch.Generator().manual_seed(seed)
    eager = [i for text in '"}],' if (i := tokenizer.token_id(text)) is not None]
    while not state.finished:
        logits_V = torch.randn(tokenizer.vocab_size, generator=generator)
        logits_V[eager] += 2.0
        logits_V[list(tokenizer.eos_token_ids)] += 4.0
        ids.append(int(state.mask_(logits_V).argmax()))
        state.accept(ids[-1])
        assert len(ids) < 3000
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return SpecialTokenFilter(["<｜end▁of▁sentence｜>"], form).push(text)


def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def parsed(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls) of a completion as an OpenAI client accumulates them."""
    content, calls = "", []
    for part, found in [*(parser.push(piece) for piece in pieces), parser.end()]:
        content += part
        for piece in found:
            if piece.index == len(calls):
                assert piece.id and re.fullmatch("call_[0-9a-f]{24}", piece.id) and piece.name
                calls.append([piece.name, ""])
            else:
                assert piece.id is None and piece.name is None and piece.arguments
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.arguments
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in parser.calls] == [*map(tuple, calls)]
    return content, [(name, arguments) for name, arguments in calls]


def check_arguments(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        value = json.loads(arguments)
        assert isinstance(value, dict)
        jsonschema_rs.validate(SCHEMAS[name], value)


@each_format
@pytest.mark.parametrize("kind", ["characters", "tokens", "bpe"])
def test_required_calls_come_and_nothing_else(form: CallFormat, kind: str) -> None:
    tokenizer, use = vocabulary(kind, form), ToolUse.read(TOOLS, "required")
    assert use
    seen, numbers = set(), set()
    for seed in range(8):
        text = completion(use.grammar(form, tokenizer), form, tokenizer, seed)
        for enforced in (True, False):
            content, calls = parsed(use.parser(form, enforced=enforced), [text])
            assert content == "" and calls, text
            check_arguments(calls)
        seen |= {name for name, _ in calls}
        numbers.add(len(calls))
    assert len(seen) > 1
    assert form.parallel or numbers == {1}


@each_format
def test_a_named_function_is_called_once(form: CallFormat) -> None:
    tokenizer, use = vocabulary("tokens", form), ToolUse.read(TOOLS, function("now_in"))
    assert use
    for seed in range(6):
        text = completion(use.grammar(form, tokenizer), form, tokenizer, seed, "ab </think>", after="</think>")
        content, calls = parsed(use.parser(form), [text.partition("</think>")[2]])
        assert content == "" and [name for name, _ in calls] == ["now_in"]
        check_arguments(calls)


@each_format
@pytest.mark.parametrize("choice", ["required", "named", "auto", "answer"])
def test_a_completion_cut_anywhere_shows_no_markup(form: CallFormat, choice: str) -> None:
    tokenizer = vocabulary("tokens", form)
    use = ToolUse.read(TOOLS, {"required": "required", "named": function("now_in")}.get(choice, "auto"))
    assert use
    answer = {"type": "object", "properties": {"x": {"const": "<tool"}}} if choice == "answer" else None
    begin = {"required": "", "named": "", "auto": "ab " + form.marker if form.anywhere else form.marker}.get(choice)
    text = completion(use.grammar(form, tokenizer, answer), form, tokenizer, 1, form.marker if begin is None else begin)
    plain = "ab" if choice == "auto" and form.anywhere else ""
    marker_ends = text.index(form.marker) + len(form.marker)
    for end in range(len(text)):
        content, calls = parsed(use.parser(form, answers=choice == "answer"), [text[:end]])
        assert len(calls) <= (1 if choice == "named" else 2**10)
        may_be_answer = not calls if form is LLAMA_3 else text[:end].strip() == "["
        if choice == "answer" and may_be_answer:
            continue
        if choice != "auto" or end >= marker_ends:
            assert content.strip() == plain, text[:end]
        else:
            assert text[:end].startswith(content)
    if choice == "answer":
        begun = '{"x": "<tool'
        assert parsed(use.parser(form, answers=True), [begun]) == (begun, [])


@each_format
@pytest.mark.parametrize("kind", ["tokens", "bpe"])
def test_a_model_may_write_text_but_a_call_once_begun_is_well_formed(form: CallFormat, kind: str) -> None:
    tokenizer, use = vocabulary(kind, form), ToolUse.read(TOOLS)
    assert use
    plain = "so <tool_cal [TOOL_C <｜tool {} </tool_call> "
    state = compiler(tokenizer).start(use.grammar(form, tokenizer))
    for token in tokenizer.encode(plain):
        assert state.allowed_V()[token]
        state.accept(token)
    assert state.complete
    assert parsed(use.parser(form), [plain]) == (plain, [])
    begin = plain + form.marker if form.anywhere else form.marker
    for seed in range(6):
        content, calls = parsed(
            use.parser(form), [completion(use.grammar(form, tokenizer), form, tokenizer, seed, begin)]
        )
        assert content == (plain.rstrip() if form.anywhere else "") and calls
        check_arguments(calls)


@each_format
@pytest.mark.parametrize("kind", ["tokens", "bpe"])
def test_an_answer_may_have_a_schema_of_its_own(form: CallFormat, kind: str) -> None:
    tokenizer, use = vocabulary(kind, form), ToolUse.read(TOOLS)
    assert use
    answer = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    for begin in ('{"x', form.marker if form.anywhere else '{"name'):
        grammar = use.grammar(form, tokenizer, answer)
        text = completion(grammar, form, tokenizer, 3, begin)
        content, calls = parsed(use.parser(form), [text])
        check_arguments(calls)
        assert len(calls) if "x" not in begin else json.loads(content)["x"] in (1, 2)


# The parser


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["now", "now_in", "weather"]),
        st.dictionaries(
            st.text(max_size=3),
            st.recursive(
                st.none() | st.integers() | st.text(st.sampled_from('{}[]"\\\n<>`é日'), max_size=5)
                | st.sampled_from(["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "```"]),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
            ),
            max_size=2,
        ).map(json.dumps),
    ),
    max_size=3,
)  # fmt: skip


def cut(text: str, places: list[int]) -> list[str]:
    cuts = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@each_format
@given(data=st.data())
def test_calls_are_found_however_a_completion_is_cut(form: CallFormat, data: st.DataObject) -> None:
    calls = data.draw(CALLS)
    calls = calls if form.parallel else calls[:1]
    content = data.draw(st.sampled_from(["", "Let me see.", "a < b [", "<tool_call", "日"])) if form.anywhere else ""
    text = content + data.draw(st.sampled_from(["", "\n", " \n"])) + form.write(calls) if calls else content
    pieces = cut(text, data.draw(st.lists(st.integers(0, 10_000), max_size=8)))
    for enforced in (True, False):
        parser = ToolCallParser(form, ["now", "now_in", "weather"], enforced=enforced)
        assert parsed(parser, pieces) == (content, calls)


NOISE = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", '{"name": "now"', ', "arguments": ', ', "parameters": ', "{", "}", '"', "a",
         "\n", " ", "[TOOL_CALLS]", "[", "]", "[ARGS]", "now", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
         "function", "<｜tool▁sep｜>", "```json\n", "```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "\\"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@each_format
@given(text=NOISE, places=st.lists(st.integers(0, 200), max_size=6))
def test_no_text_is_lost_and_cuts_change_nothing(form: CallFormat, text: str, places: list[int]) -> None:
    whole = parsed(ToolCallParser(form, ["now"], enforced=False), [text])
    assert parsed(ToolCallParser(form, ["now"], enforced=False), cut(text, places)) == whole
    content, calls = whole
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {"a": }}\n</tool_call> and so on',
        '<tool_call>\n{"name": "now", "arguments": "x"}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {"a": [1}',
        "<tool_call>\nnow()\n</tool_call>\n",
        "The markup is <tool_call>, and then </tool_call>.",
        " \n<tool_call>",
    ],
)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    for pieces in ([text], list(text)):
        assert parsed(ToolCallParser(HERMES, ["now"], enforced=False), pieces) == (text, [])


def test_a_call_behind_what_only_looks_like_one() -> None:
    text = 'A <tool_call> is: <tool_call>{"name":"now","arguments":{}}</tool_call> Done.'
    assert parsed(ToolCallParser(HERMES, ["now"], enforced=False), list(text)) == (
        "A <tool_call> is:Done.",
        [("now", "{}")],
    )


def test_arguments_come_as_they_are_written_where_a_grammar_is_in_force() -> None:
    parser = ToolCallParser(HERMES, ["now"], enforced=True)
    assert parser.push('Hm. <tool_call>\n{"name": "now"') == ("Hm.", [])
    content, pieces = parser.push(', "arguments": {')
    first, second = (piece.delta() for piece in pieces)
    assert content == "" and first["id"].startswith("call_")
    assert first | {"id": ""} == {
        "index": 0,
        "id": "",
        "type": "function",
        "function": {"name": "now", "arguments": ""},
    }
    assert second == {"index": 0, "function": {"arguments": "{"}}
    assert parser.push('"a": "\\') == ("", [CallPiece(0, '"a": "\\')])
    assert parser.end() == ("", []), "cut off at its length"
    assert parser.calls[0]["function"]["arguments"] == '{"a": "\\'


def test_blank_space_without_end_is_no_work_without_end() -> None:
    parser = ToolCallParser(HERMES, ["now"], enforced=False)
    began = time.process_time()
    pieces = [parser.push(piece) for piece in ["<tool_call>", *["\n"] * 20_000, "no"]]
    assert "".join(content for content, _ in pieces) == "<tool_call>" + "\n" * 20_000 + "no"
    assert time.process_time() - began < 5


def test_special_tokens_are_taken_out_but_not_the_markup() -> None:
    text = "a</s><s>b [TOOL_CALLS][1] <"
    names = ["</s>", "<s>", "[TOOL_CALLS]"]
    for places in range(len(text)):
        keep = SpecialTokenFilter(names, MISTRAL)
        assert "".join(map(keep.push, cut(text, [places]))) + keep.end() == "ab [TOOL_CALLS][1] <"
    nothing = SpecialTokenFilter([], MISTRAL)
    assert nothing.push("<s>") == "<s>" and nothing.end() == ""


# The engine


TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.3,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize("thinks", [False, True])
def test_a_random_model_calls_tools(thinks: bool) -> None:
    alphabet = "".join(map(chr, range(32, 127))) + "\n°"
    tokenizer = Tokenizer.characters(alphabet)
    lm = LanguageModel.create(TINY | {"vocab_size": tokenizer.vocab_size}, tokenizer)
    prompts, use = ToolPrompts.of(tokenizer), ToolUse.read(TOOLS, "required")
    assert use
    grammar = use.grammar(prompts.form, tokenizer)
    messages, shown = prompts.prepare([{"role": "user", "content": "Call."}], use.given)
    params = SamplingParams(
        max_tokens=400, n=4, seed=1, grammar=grammar.after("</think>") if thinks else grammar, logit_bias={1: 20.0}
    )
    (completions,) = Engine(lm).generate([tokenizer.chat(messages, tools=shown)], params)
    found = 0
    for sample in completions:
        splitter = ReasoningSplitter(thinking=thinks)
        parts = [*map(splitter.push, sample.text), splitter.end()]
        content, calls = parsed(use.parser(prompts.form), [part for _, part in parts])
        assert bool("".join(thinking for thinking, _ in parts)) == thinks
        if sample.finish_reason == "stop":
            assert content == "" and calls
            check_arguments(calls)
            found += 1
    assert found >= 2
