"""Stop texts, found in a text that arrives piece by piece.

Wherever a stop text may have begun is kept as an open beginning. In the sorted list of stop texts those that begin with
a given text stand side by side, the text itself first; so one binary search a character tells of an open beginning
whether it goes on, ends a stop text, or led nowhere. A character costs what the open beginnings are many (mostly none,
at the very most the length of the longest stop text), however long the text is already. What must not be shown yet is
what follows the oldest open beginning, and not a character more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class StopTexts:
    """A set of stop texts, for any number of texts to be watched."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted(set(stops))

    def watch(self) -> Watch:
        """Begin a new text."""
        return Watch(self._stops)


class Watch:
    """One text as it arrives, cut before its first stop text.

    The text ends with the first piece that completes a stop text; of those it completes, the one that begins first
    counts. What `push` and `flush` return, joined, is the text before it, or the whole text when there is none.

    Attributes:
        found: whether a stop text is complete. Nothing comes after.
        stop: that stop text; the shortest of those that begin there.
    """

    def __init__(self, stops: list[str]) -> None:
        self.found = False
        self.stop: str | None = None
        self._stops = stops  # sorted
        self._held = ""
        self._begun: list[int] = []  # where in the held text a stop text may have begun, the oldest first

    def push(self, piece: str) -> str:
        """Add a piece; returns what can be shown now."""
        if not self._stops or self.found:
            return "" if self.found else piece
        text, begun, cuts = self._held + piece, self._begun, []
        for place in range(len(self._held), len(text)):
            open_ones = []
            for at in (*begun, place):
                beginning = text[at : place + 1]
                i = bisect_left(self._stops, beginning)
                if i < len(self._stops) and self._stops[i].startswith(beginning):
                    open_ones.append(at)
                    if len(self._stops[i]) == len(beginning):
                        cuts.append((at, place + 1))
            begun = open_ones
        if cuts:
            self.found, self._held, self._begun = True, "", []
            at, end = min(cuts)
            self.stop = text[at:end]
            return text[:at]
        shown = begun[0] if begun else len(text)
        self._held, self._begun = text[shown:], [at - shown for at in begun]
        return text[:shown]

    def flush(self) -> str:
        """The text has ended: what was held back, since no stop text came of it."""
        held, self._held, self._begun = self._held, "", []
        return held
