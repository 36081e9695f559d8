"""Stop texts, found in a text that arrives piece by piece.

All stop texts stand in one trie. While a text arrives, a place where some stop text may have begun is a node of the
trie; each new character carries every such node one step further, drops it, or ends a stop text. So a character costs
what the open beginnings are many (mostly none, at the very most the length of the longest stop text), however many stop
texts there are and however long the text is already. What must not be shown yet is what follows the oldest open
beginning, and not a character more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Node: TypeAlias = "dict[str, Node]"
END = ""  # the key, beside those of single characters, of a node at which a stop text ends


class StopTexts:
    """A set of stop texts, for any number of texts. Memory and time to build grow with the stops' total length."""

    def __init__(self, stops: Iterable[str]) -> None:
        self.root: Node = {}
        for stop in stops:
            node = self.root
            for character in stop:
                node = node.setdefault(character, {})
            node[END] = {}

    def watch(self) -> Watch:
        """Begin a new text."""
        return Watch(self.root)


class Watch:
    """One text as it arrives, cut before its first stop text.

    The text ends with the first piece that completes a stop text; of those it completes, the one that begins first
    counts. What `push` and `flush` return, joined, is the text before it, or the whole text when there is none.

    Attributes:
        found: whether a stop text is complete. Nothing comes after.
    """

    def __init__(self, root: Node) -> None:
        self.found = False
        self._root = root
        self._held = ""
        self._begun: list[tuple[int, Node]] = []  # where in the held text a stop text may have begun, the oldest first

    def push(self, piece: str) -> str:
        """Add a piece; returns what can be shown now."""
        if not self._root or self.found:
            return "" if self.found else piece
        text, begun, cuts = self._held + piece, self._begun, []
        for place in range(len(self._held), len(text)):
            character = text[place]
            begun = [(at, node[character]) for at, node in (*begun, (place, self._root)) if character in node]
            cuts += [at for at, node in begun if END in node]
        if cuts:
            self.found, self._held, self._begun = True, "", []
            return text[: min(cuts)]
        shown = begun[0][0] if begun else len(text)
        self._held, self._begun = text[shown:], [(at - shown, node) for at, node in begun]
        return text[:shown]

    def flush(self) -> str:
        """The text has ended: what was held back, since no stop text came of it."""
        held, self._held, self._begun = self._held, "", []
        return held
