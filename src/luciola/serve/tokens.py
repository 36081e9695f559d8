"""Single tokens as text and bytes: what log-probabilities in a reply are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from luciola.serve.replies import TokenLogprob, TopLogprob
from luciola.text.token_bytes import token_bytes
from luciola.text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON lacks


class TokenTexts:
    """The texts of one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _table(self) -> list[bytes] | None:
        """The bytes of every token; None where the tokenizer spells them in a way that is not known."""
        try:
            return token_bytes(self._tokenizer)[0]
        except ValueError:
            return None

    def bytes(self, token: int) -> bytes:
        """What it adds to a text."""
        if self._table is None:
            return self._tokenizer.decode([token], skip_special_tokens=False).encode()
        return self._table[token] if token < len(self._table) else b""

    def text(self, token: int) -> str:
        """The same as text; a part of a character as OpenAI writes it, "bytes:\\xe2\\x82"."""
        spelled = self.bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def entry(self, token: int, logprob: float, top: Mapping[int, float]) -> TokenLogprob:
        """A token of a chat reply with its log-probability and those of the likeliest."""
        likeliest = [self._top(*pair) for pair in top.items()]
        own = self._top(token, logprob)
        return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=likeliest)

    def table(self, top: Mapping[int, float]) -> dict[str, float]:
        """The likeliest tokens of a place as completions list them. Of two with one text the likelier stays."""
        found: dict[str, float] = {}
        for token, logprob in top.items():
            found.setdefault(self.text(token), finite(logprob))
        return found

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """The text of each."""
        return [self.text(token) for token in tokens]

    def _top(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self.text(token), logprob=finite(logprob), bytes=list(self.bytes(token)))


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, LEAST)
