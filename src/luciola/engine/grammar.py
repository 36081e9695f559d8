"""Constrained decoding: which tokens may follow, so that the text keeps to a JSON schema, a regular expression or a
grammar.

llguidance does the parsing: an Earley parser over a lexer, walked along the tree of all tokens. It sees bytes only, so
a token is allowed exactly if its bytes lead to a text that can still be completed; how the text is cut into tokens
stays the model's choice. What it does not do is here: the end token, the free text before a trigger such as "</think>",
and an account of the time it takes.

Shapes: V rows of the model's vocabulary.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from luciola.text.token_bytes import token_bytes
from luciola.text.tokenizer import Tokenizer
from luciola.text.untrusted import printable, shortened

MAX_SOURCE = 1 << 20  # characters of a schema or grammar; published collections of schemas stay below
COMPILED = 64  # grammars kept ready by a GrammarCompiler
# Whoever may send a schema decides how much work it is. Of llguidance's limits these bound the time and memory to
# compile one, a few seconds and some hundred MB, and of a step; "verbose" errors repeat the whole state of the parser.
LIMITS = LLParserLimits(
    max_items_in_row=10_000, max_grammar_size=200_000, initial_lexer_fuel=1_000_000, verbose_errors=False
)
# Between the parts of a JSON text: a blank, or a new line with its indentation; unbounded, small models stay there.
WHITESPACE = r"[ \t]|\n[ \t]{0,40}"
# llguidance's own, in a schema's key "x-guidance".
OPTIONS = {"whitespace_pattern": WHITESPACE, "coerce_one_of": True}

DATA = ("const", "enum", "default", "examples")  # keywords of a schema whose values are no schemas
LOOKAROUND = re.compile(r"\(\?<?[=!]|\\[1-9]|\(\?P=|\\k<")


class DeadEndError(ValueError):
    """No token can continue a constrained text that is not complete either."""


@dataclass(frozen=True)
class Grammar:
    """A language of texts; made by `json`, `regex`, `lark` or `python`. Equal grammars are compiled once.

    Attributes:
        source: the grammar in llguidance's own notation, in JSON.
        trigger: the text after which the grammar begins, or None: it begins at once.
    """

    source: str
    trigger: str | None = None

    @classmethod
    def json(cls, schema: dict[str, Any] | str | bool | None = None, lenient: bool = False) -> Grammar:
        """JSON texts that fit `schema`: a JSON schema (draft 2020-12), the same as text, True for any value, or None
        for any object. Properties come in the schema's order. Where the schema says `oneOf`, any of the branches may
        match, as if it said `anyOf`: that no second one does is not enforced. Branches that differ in a constant, such
        as pydantic's discriminated unions, exclude each other anyway. `lenient` leaves aside what cannot be kept, such
        as `uniqueItems`, instead of refusing the schema.

        Raises:
            ValueError: not a JSON schema, one with a keyword that cannot be kept, one that nothing fits, or one that is
                too large.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"schema is not valid JSON: {printable(str(error))}; mend it there.") from error
        if schema is None:
            schema = {"type": "object"}
        if schema is True:
            schema = {}
        if schema is False:
            raise ValueError("schema is false, which nothing fits; give true for any value.")
        if not isinstance(schema, dict):
            raise ValueError(f"schema must be an object, true or None, not {shortened(schema)}.")
        return cls._checked("schema", f"start: {json_rule(schema, lenient)}")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Texts that `pattern` matches from end to end, in the notation of Rust's regex library: like Python's, without
        looking around, references back and anchors inside.

        Raises:
            ValueError: not such a pattern, or one that is too large.
        """
        _must_be_text("regex", pattern)
        (grammar,) = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"]
        return cls._checked("regex", grammar["lark_grammar"])

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """The language of a context-free grammar, its first rule `start`, in llguidance's dialect of Lark's notation.

        Raises:
            ValueError: not such a grammar, or one that is too large.
        """
        _must_be_text("grammar", text)
        return cls._checked("grammar", text)

    @classmethod
    @functools.cache
    def python(cls) -> Grammar:
        """Programs in a large part of Python 3.11, each of which `ast.parse` takes; python.lark says which part."""
        return cls._checked("grammar", files("luciola.engine").joinpath("python.lark").read_text(encoding="utf-8"))

    def after(self, text: str) -> Grammar:
        """The same grammar, but the model writes freely until `text` has occurred, and ends only behind the grammar.

        Raises:
            ValueError: `text` is empty, or one has been given before.
        """
        _must_be_text("after", text)
        if self.trigger:
            raise ValueError(f"the grammar begins after {shortened(self.trigger)} already; give one text.")
        if not text:
            raise ValueError("after is empty; give the text behind which the grammar begins, such as '</think>'.")
        return replace(self, trigger=text)

    @classmethod
    def _checked(cls, what: str, lark: str) -> Grammar:
        if len(lark) > MAX_SOURCE:
            raise ValueError(f"{what} has {len(lark):,} characters; at most {MAX_SOURCE:,} are taken.")
        # Without this llguidance permits, where only one text can follow, only one way of cutting it into tokens.
        lark += '\n%llguidance {"no_forcing": true}\n'
        source = json.dumps({"grammars": [{"lark_grammar": lark}]})
        fault = LLMatcher.validate_grammar(source, None, limits=LIMITS)
        if fault:
            raise ValueError(f"{what} cannot be used: {_sentence(fault)}.")
        return cls(source)


def json_rule(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """What stands for the JSON texts that fit `schema` in a rule of a Lark grammar.

    Args:
        schema: a JSON schema, whose references are to places in itself.
        lenient: leave aside keywords that cannot be kept instead of refusing the schema.

    Raises:
        ValueError: it cannot be written as JSON, or has a key that would change what counts as JSON.
    """
    if "x-guidance" in schema:
        raise ValueError("schema has the key 'x-guidance', which would change what counts as JSON; take it out.")
    try:
        if lenient:
            schema = _without_lookaround(schema)
        return "%json " + json.dumps({**schema, "x-guidance": OPTIONS | {"lenient": lenient}}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema cannot be written as JSON: {printable(str(error))}.") from error


def _without_lookaround(schema: Any) -> Any:
    """The schema without the patterns that look around or refer back, which no automaton keeps."""
    if isinstance(schema, list):
        return [_without_lookaround(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: part if key in DATA else _without_lookaround(part)
        for key, part in schema.items()
        if not (key == "pattern" and isinstance(part, str) and LOOKAROUND.search(part))
    }


def _must_be_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {shortened(value)}.")


def _sentence(fault: str) -> str:
    """What llguidance says, without the picture of the place and the state of its parser that stand below."""
    if fault.startswith("panic"):
        return "llguidance fails on it"
    fault = re.split(r"\n\s*(?:\d+ \||<)", fault)[0]
    fault = re.sub(r"^at 1\(8\): (failed to compile JSON schema: )?", "", fault)  # the only place in a schema or regex
    return printable(" ".join(fault.split()), 300).rstrip(".")


class _Vocabulary:
    """A model's tokens as llguidance takes them, with 257 more behind the V rows: every byte, then the end.

    The bytes are for the rest of a token that goes past the trigger, which no token need spell. The end token is
    llguidance's wish; the model may have several, or none.
    """

    is_tokenizer_wrapper = True  # how llguidance knows an object with the attributes below
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        known, special = token_bytes(tokenizer)
        known = known[:vocab_size]
        self.V, self.real = vocab_size, known + [b""] * (vocab_size - len(known))
        self.tokens = [*self.real, *(bytes([byte]) for byte in range(256)), b""]
        self.eos_token_id = len(self.tokens) - 1
        ends = {token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size}
        self.special = special | ends
        self.special_token_ids = [*(i for i in self.special if i < vocab_size), self.eos_token_id]
        self.ends = sorted(ends)
        # As without a grammar: every token but the end. Rows without a token are nothing the model was taught.
        self.free_V = torch.tensor([bool(token) for token in self.real])
        self.free_V[self.ends] = False
        self.words = (len(self.tokens) + 31) // 32

    def __call__(self, text: str) -> list[int]:
        """How llguidance would cut a text that it forces, which no grammar here lets it do."""
        return self.spell(text.encode())

    def spell(self, text: bytes) -> list[int]:
        return [self.V + byte for byte in text]

    def allowed_V(self, bits: np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        """llguidance's bit mask as (V,) bool, without the end tokens."""
        mask = np.unpackbits(bits.view(np.uint8), count=self.V, bitorder="little")
        allowed_V = torch.from_numpy(mask.view(np.bool_))
        allowed_V[self.ends] = False
        return allowed_V

    def text_of(self, token: int, trigger: bytes) -> bytes:
        """What a token adds to the free text. A special token is no text, unless it is what is waited for."""
        name = self.real[token]
        return b"" if token in self.special and trigger not in name else name


class _Compiled:
    """A grammar with a tokenizer: the parser at its beginning, and what the trigger needs."""

    def __init__(self, grammar: Grammar, vocabulary: _Vocabulary, tokens: LLTokenizer) -> None:
        self.vocabulary = vocabulary
        self.trigger = (grammar.trigger or "").encode()
        self.beginning = LLMatcher(tokens, grammar.source, log_level=0, limits=LIMITS)
        if self.beginning.is_error():
            raise ValueError(f"The grammar cannot be used: {_sentence(self.beginning.get_error())}.")
        first = np.zeros(vocabulary.words, dtype=np.int32)
        self.beginning.deep_copy().unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        if not vocabulary.allowed_V(first).any():
            # The mask also says which bytes could come first, though no token has them.
            if np.unpackbits(first.view(np.uint8), bitorder="little")[vocabulary.V :][:256].any():
                reason = "no token of the model can begin it"
            else:
                reason = "only the empty text fits it" if self.beginning.is_accepting() else "no text fits it"
            raise ValueError(f"The grammar cannot be used: {reason}.")
        self._waiting: dict[int, Tensor] = {}

    def waiting_V(self, overlap: int) -> Tensor:
        """The tokens allowed before the trigger, of which the first `overlap` bytes stand at the end of the text: all
        but those that go past the trigger with bytes the grammar does not begin with."""
        if overlap not in self._waiting:
            allowed_V, fits = self.vocabulary.free_V.clone(), {b"": True}
            for token in allowed_V.nonzero().flatten().tolist():
                rest = self.past(overlap, self.vocabulary.text_of(token, self.trigger))
                if rest is None:
                    continue
                if rest not in fits:
                    spelled = self.vocabulary.spell(rest)
                    fits[rest] = self.beginning.deep_copy().validate_tokens(spelled) == len(spelled)
                allowed_V[token] = fits[rest]
            self._waiting[overlap] = allowed_V
        return self._waiting[overlap]

    def past(self, overlap: int, text: bytes) -> bytes | None:
        """What of `text` goes past the trigger, None if the trigger is still to come."""
        _, found, rest = (self.trigger[:overlap] + text).partition(self.trigger)
        return rest if found else None

    def overlap(self, overlap: int, text: bytes) -> int:
        """The longest beginning of the trigger at the end of the text, after `text`."""
        text = self.trigger[:overlap] + text
        longest = min(len(text), len(self.trigger) - 1)
        return next(n for n in range(longest, -1, -1) if text.endswith(self.trigger[:n]))


class GrammarCompiler:
    """Makes grammars ready for one tokenizer; building it takes about a second for 100,000 tokens.

    Args:
        tokenizer: the model's.
        vocab_size: rows of the model's logits; those without a token are never allowed.
        eos_token_ids: the tokens that end a completion; they are allowed where the grammar is complete.

    Raises:
        ValueError: the tokenizer is of a kind whose tokens have no bytes of their own.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._tokens = LLTokenizer(self._vocabulary)  # type: ignore[arg-type]  # known by its attributes
        self._compiled = functools.lru_cache(COMPILED)(self._compile)

    def _compile(self, grammar: Grammar) -> _Compiled:
        return _Compiled(grammar, self._vocabulary, self._tokens)

    def start(self, grammar: Grammar) -> GrammarState:
        """The state of a sequence of which nothing is written yet.

        Raises:
            ValueError: the grammar cannot be used with this tokenizer.
        """
        return GrammarState(self._compiled(grammar))


class GrammarState:
    """Where a sequence stands in its grammar.

    Attributes:
        tokens: tokens accepted.
        seconds: time spent on them.
    """

    def __init__(self, compiled: _Compiled) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._compiled = compiled
        self._overlap = 0  # bytes of the trigger at the end of the text
        self._matcher = None if compiled.trigger else compiled.beginning.deep_copy()  # None before the trigger
        self._allowed_V: Tensor | None = None
        self._ended = False

    @property
    def started(self) -> bool:
        """Whether the grammar has begun; before, the model writes freely."""
        return self._matcher is not None

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but the end token can follow."""
        return self._ended or (self.complete and not self._continuing_V().any())

    @property
    def complete(self) -> bool:
        """Whether the text could end here."""
        return self._matcher is not None and (self._ended or self._matcher.is_accepting())

    def allowed_V(self) -> Tensor:
        """The tokens which may come next, (V,) bool.

        Raises:
            DeadEndError: there is none, or the grammar is more than llguidance's limits for a step permit.
        """
        if self._ended:
            return torch.zeros_like(self._compiled.vocabulary.free_V)
        allowed_V = self._continuing_V()
        if self.complete:
            allowed_V = allowed_V.clone()
            allowed_V[self._compiled.vocabulary.ends] = True
        elif not allowed_V.any():
            raise DeadEndError("no token can continue the text by its grammar, and it is not complete either")
        return allowed_V

    def mask_(self, logits_V: Tensor) -> Tensor:
        """Set the logits of forbidden tokens to -inf, in place; errors as `allowed_V`."""
        return logits_V.masked_fill_(~self.allowed_V().to(logits_V.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Go on past `token`.

        Raises:
            ValueError: it is not allowed here.
        """
        began = time.perf_counter()
        vocabulary = self._compiled.vocabulary
        if self._ended or not 0 <= token < vocabulary.V:
            raise ValueError(f"token {token} cannot follow: the text is at its end, or there is no such token")
        if token in vocabulary.ends:
            if not self.complete:
                raise ValueError(f"the end token {token} cannot follow: the text is not complete")
            self._ended = True
        elif self._matcher is not None:
            self._consume(self._matcher, [token], token)
        elif self._compiled.waiting_V(self._overlap)[token]:
            text = vocabulary.text_of(token, self._compiled.trigger)
            rest = self._compiled.past(self._overlap, text)
            if rest is None:
                self._overlap = self._compiled.overlap(self._overlap, text)
            else:
                self._matcher = self._compiled.beginning.deep_copy()
                self._consume(self._matcher, vocabulary.spell(rest), token)
        else:
            raise ValueError(f"token {token} cannot follow: it goes past the trigger with text the grammar refuses")
        self._allowed_V = None
        self.tokens += 1
        self.seconds += time.perf_counter() - began

    def fork(self) -> GrammarState:
        """A state at the same place, which goes its own way; its account of time begins anew."""
        twin = GrammarState.__new__(GrammarState)
        twin.__dict__ |= self.__dict__
        twin._matcher = None if self._matcher is None else self._matcher.deep_copy()
        twin.tokens, twin.seconds = 0, 0.0
        return twin

    def _consume(self, matcher: LLMatcher, tokens: list[int], token: int) -> None:
        if matcher.validate_tokens(tokens) < len(tokens):
            raise ValueError(f"token {token} cannot follow: the grammar refuses its text")
        if not matcher.consume_tokens(tokens):
            raise DeadEndError(f"the grammar is too complex here: {_sentence(matcher.get_error())}")

    def _continuing_V(self) -> Tensor:
        """The tokens that may come next, the end apart; computed once a place."""
        if self._allowed_V is None:
            began = time.perf_counter()
            if self._matcher is None:
                self._allowed_V = self._compiled.waiting_V(self._overlap)
            else:
                self._allowed_V = _mask(self._matcher, self._compiled.vocabulary)
            self.seconds += time.perf_counter() - began
        return self._allowed_V


def _mask(matcher: LLMatcher, vocabulary: _Vocabulary) -> Tensor:
    """The tokens whose text can come next, (V,) bool; without the end tokens."""
    bits = np.zeros(vocabulary.words, dtype=np.int32)
    if not matcher.is_stopped():
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    if matcher.is_error():
        raise DeadEndError(f"the grammar is too complex here: {_sentence(matcher.get_error())}")
    return vocabulary.allowed_V(bits)
