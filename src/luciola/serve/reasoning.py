"""A completion that arrives in pieces, parted into the thinking and what follows it.

`text.chat.split_reasoning` does this to a whole text; here the same is said as early as it is certain. A tag may come
in several pieces, so text that could begin one is held back, and so is blank space until it is known whether it
belongs to the markup.
"""

from __future__ import annotations

from luciola.text.chat import END_THINK, THINK


class ReasoningSplitter:
    """Parts one completion; all that `push` and `end` return, joined, is (thinking, content).

    Only a `<think>` at the beginning opens the thinking, blank space before it allowed, and only the first `</think>`
    ends it. A completion that never closes its thinking is all thinking, one that never opens it all content. Blank
    space around the thinking, and before what follows it, belongs to the markup and is dropped.

    Args:
        thinking: whether the prompt has opened the thinking already; a model that opens it once more is forgiven.
        separate: False makes everything content, the tags included.
    """

    def __init__(self, thinking: bool = False, separate: bool = True) -> None:
        self._opened = thinking
        # What comes next: "start" (perhaps an opening tag), "thinking", "gap" (before the content), "content".
        self._place = "start" if separate else "content"
        self._held = ""
        self._shown = False  # whether any thinking was given out; blank space before the first is dropped

    @property
    def thinking(self) -> bool:
        """Whether the completion is within its thinking, as far as is known."""
        return self._place == "thinking" or (self._place == "start" and self._opened)

    def push(self, text: str) -> tuple[str, str]:
        """Add a piece of the completion; what is certain now of (thinking, content) and was not given out before."""
        self._held += text
        thinking = ""
        if self._place == "start":
            self._start()
        if self._place == "thinking":
            thinking = self._think()
        if self._place == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._place = "content"
        content = ""
        if self._place == "content":
            content, self._held = self._held, ""
        return thinking, content

    def end(self) -> tuple[str, str]:
        """What is still held back, as it is now that nothing follows."""
        held, self._held = self._held, ""
        if not self.thinking:
            return "", held  # a tag that was never finished, or blank space where it could have followed
        held = held.rstrip()
        return (held if self._shown else held.lstrip()), ""

    def _start(self) -> None:
        """Past an opening tag, or not, if that is certain."""
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._place, self._held = "thinking", begun.removeprefix(THINK)
        elif not THINK.startswith(begun):
            self._place = "thinking" if self._opened else "content"

    def _think(self) -> str:
        """The part of the held text that is thinking for certain."""
        head, closed, rest = self._held.partition(END_THINK)
        if closed:
            self._place, self._held = "gap", rest
            certain = head.rstrip()
        else:
            partial = next(n for n in range(len(END_THINK) - 1, -1, -1) if head.endswith(END_THINK[:n]))
            certain = head[: len(head) - partial].rstrip()
            self._held = head[len(certain) :]
        if not self._shown:
            certain = certain.lstrip()
            self._shown = bool(certain)
        return certain
