"""Where the thinking of a completion is, and how it is brought to its end: after a budget of tokens, or when asked to.

A text thinks from `<think>`, with which the prompt ends or the text begins, to `</think>`. To end it the engine writes
that tag in the model's place, at the positions that come next; everything else is drawn as ever, with the same random
numbers. The tags may be tokens of their own or be spelled in several: it is the text that counts. Of a tag the model
has begun only the rest is written.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

from luciola.engine.grammar import GrammarState
from luciola.text.chat import END_THINK, THINK
from luciola.text.tokenizer import Tokenizer

TAIL = 64  # tokens at a prompt's end among which an opening tag is looked for: there may be many blanks behind it
CONTEXT = 16  # tokens in which the closing tag is written out to see what becomes of it


def opens(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends with `<think>`, blank space aside, so that the completion begins with thinking."""
    return tokenizer.thinks and tokenizer.decode(prompt[-TAIL:], False).rstrip().endswith(THINK)


def thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> int:
    """The tokens of a prompt behind its last `<think>`; 0 if that is not there or only blank space follows."""
    if opens(tokenizer, prompt) or THINK not in tokenizer.decode(prompt, False):
        return 0
    # The shortest end of the prompt that has the tag, then the shortest beginning of that.
    tail = _shortest(len(prompt), lambda n: THINK in tokenizer.decode(prompt[-n:], False))
    return tail - _shortest(tail, lambda n: THINK in tokenizer.decode(prompt[-tail:][:n], False))


def _shortest(most: int, enough: Callable[[int], bool]) -> int:
    """The least of 1 to `most` that is enough; `most` is, and so is all above it."""
    return 1 + bisect_left(range(1, most), True, key=enough)


def thinking_tokens(tokenizer: Tokenizer, tokens: Sequence[int], text: str, opened: bool) -> int:
    """The tokens of a completion up to its first `</think>`, that included; all where thinking has begun and does not
    end; 0 where there is none. `text` is the text of all of them; special tokens may be missing there."""
    if not tokenizer.thinks:
        return 0
    if not opened and not tokenizer.decode(tokens[:TAIL], False).lstrip().startswith(THINK):
        return 0  # a `</think>` by itself ends nothing
    end = tokenizer.token_id(END_THINK)
    if end is not None and end in tokens:
        return tokens.index(end) + 1
    if END_THINK in text:  # spelled in several tokens
        return _shortest(len(tokens), lambda n: END_THINK in tokenizer.decode(tokens[:n], False))
    return len(tokens)


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """`</think>` in tokens, the one that stands for it where there is one; none where the model does not think."""
    if not tokenizer.thinks:
        return []
    token = tokenizer.token_id(END_THINK)
    tokens = tokenizer.encode(END_THINK) if token is None else [token]
    return tokens if tokenizer.decode(tokens, False).endswith(END_THINK) else []


class Thinking:
    """Follows the thinking of one sequence until it is over.

    Args:
        closing: the tokens of `</think>`.
        opened: the prompt ends in the midst of thinking.
        spent: tokens of thinking that the prompt has already.
        budget: tokens of thinking after which it is ended; None: no bound.
        stop: set by whoever wants it to end at the next token.

    Attributes:
        over: there is no thinking any more, or the text has begun without; nothing is to be done then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        closing: Sequence[int],
        opened: bool,
        spent: int = 0,
        budget: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.over = False
        self._tokenizer, self._whole, self._budget, self._stop = tokenizer, list(closing), budget, stop
        self._decoder = tokenizer.stream(skip_special_tokens=False)
        self._inside = opened
        self._text = ""  # while it is open whether the text begins with thinking, all of it; then what may be a tag
        self._last: list[int] = []
        self._spent = spent
        self._rest: list[int] = []  # of the closing tag that is being written

    def forced(self, grammar: GrammarState | None = None) -> int | None:
        """The token that comes next whatever the model thinks of it; None: it is free. A grammar has the last word: as
        long as it does not let the tag in, thinking goes on.

        Raises:
            DeadEndError: by the grammar.
        """
        if not self._rest and self._due:
            self._rest = self._closing()
        if self._rest and grammar is not None and not grammar.allowed_V()[self._rest[0]]:
            self._rest = []
        return self._rest[0] if self._rest else None

    def accept(self, token: int) -> None:
        """Go on past `token`."""
        self._last = [*self._last[1 - CONTEXT :], token]
        self._text += self._decoder.push(token)
        if self._inside:
            self._spent += 1
            # A tag written to its end is the end, even if a decoder makes another text of it.
            self.over = END_THINK in self._text or self._rest == [token]
            self._text = self._text[1 - len(END_THINK) :]
            self._rest = self._rest[1:]
            return
        begun = self._text.lstrip()
        if begun.startswith(THINK):
            self._inside, self._text = True, begun[len(THINK) :]
            self.over = END_THINK in self._text
        elif not THINK.startswith(begun):
            self.over = True

    @property
    def _due(self) -> bool:
        if not self._inside or self.over:
            return False
        spent = self._budget is not None and self._spent >= self._budget
        return spent or (self._stop is not None and self._stop.is_set())

    def _closing(self) -> list[int]:
        """The tokens of `</think>`, or of its rest where the text ends with a beginning of it."""
        begun = next((n for n in range(len(END_THINK) - 1, 0, -1) if self._text.endswith(END_THINK[:n])), 0)
        if begun:
            rest = self._tokenizer.encode(END_THINK[begun:])
            # Tokenizers that put a blank before every text cannot spell a rest.
            if self._tokenizer.decode([*self._last, *rest], False).endswith(END_THINK):
                return rest
        return list(self._whole)
