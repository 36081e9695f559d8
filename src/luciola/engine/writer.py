"""The text of a completion while it grows: whole characters only, and nothing that may become a stop text."""

from __future__ import annotations

from luciola.engine.stopping import StopTexts
from luciola.text.tokenizer import Tokenizer


class Writer:
    """Turns tokens into text one at a time.

    Attributes:
        text: what is certain so far; once the completion has ended, all of it, without the stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: StopTexts, skip_special_tokens: bool = True) -> None:
        self.text = ""
        self._decoder, self._watch = tokenizer.stream(skip_special_tokens), stops.watch()
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop text is complete."""
        self.text += self._watch.push(self._decoder.push(token))
        return self._watch.found

    @property
    def stop(self) -> str | None:
        """The stop text that has ended it."""
        return self._watch.stop

    def end(self) -> None:
        """No token comes any more: what was held back belongs to the text, unless a stop text has ended it."""
        if not self._watch.found:
            self.text += self._watch.push(self._decoder.flush())
        self.text += self._watch.flush()

    def take(self) -> str:
        """What has become certain since this was last asked."""
        start, self._taken = self._taken, len(self.text)
        return self.text[start:]
