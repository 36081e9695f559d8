"""Speculation: guess the next few tokens, let the model check all of them in one pass.

Reading k drafted tokens costs the model little more than reading one, as long as few sequences run. At each position
the token is then drawn just as it would have been without drafts, from the same distribution with the same random
number; a draft counts if it is that very token, and what follows the first that is not is thrown away. So the tokens
are the same as without speculation, whatever the drafts are; only the time depends on them.

Drafts come from the model's multi-token prediction module (V3 report, section 5.4.3: 85 to 90 % of its tokens are
accepted), one a step; or from the text so far: what followed the last tokens when they
stood there before (prompt lookup).

Shapes: N tokens, B sequences, D hidden, X hidden or vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from luciola.engine.cache import Piece, PromptCache
from luciola.engine.sampler import largest
from luciola.engine.sequence import Sequence
from luciola.model.transformer import Transformer

if TYPE_CHECKING:
    from luciola.engine.runner import Runner

Method = Literal["mtp", "ngram"]
MOST_DRAFTS = {"mtp": 1, "ngram": 8}  # a second token by the module's own output is right half as often as the first
LONGEST_GRAM = 3  # tokens that must stand there again
TRIAL = 8  # steps with drafts before it is judged whether they pay
PLAIN = 3  # steps without drafts, until it is known what those take
MEMORY = 0.9  # how much of the past a running mean keeps at each step


@dataclass(slots=True)
class Pace:
    """How speculation does for one sequence: how many drafts to make next, and whether it pays at all."""

    drafts: int = 1
    steps: int = 0
    hits: int = 0  # drafts accepted in all of them
    gained: float = 0.0  # running mean of accepted drafts a step
    paying: bool = True
    grams: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0

    def judge(self, drafted: int, accepted: int, most: int, cost: float) -> None:
        """After a step that accepted so many of the drafts and, with them, took `cost` times a step without."""
        self.steps += 1
        self.hits += accepted
        weight = max(1 - MEMORY, 1 / self.steps)
        self.gained += weight * (accepted - self.gained)
        self.drafts = min(most, drafted + 1) if accepted == drafted else max(1, accepted)
        if self.steps >= TRIAL and (1 + self.gained < cost or not self.hits):
            self.paying = False


class Clock:
    """Seconds of a step with and without drafts, as running means by the number of sequences (to powers of two)."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], float] = {}

    def note(self, sequences: int, drafts: bool, seconds: float) -> None:
        """A step of pure decoding took so long."""
        key = (sequences.bit_length(), drafts)
        before = self._seconds.get(key, seconds)
        self._seconds[key] = MEMORY * before + (1 - MEMORY) * min(seconds, 4 * before)

    def knows_plain(self, sequences: int) -> bool:
        """Whether steps without drafts have been timed."""
        return (sequences.bit_length(), False) in self._seconds

    def cost(self, sequences: int) -> float:
        """How many times longer a step takes with drafts; 1 while that is not known."""
        plain, drafted = (self._seconds.get((sequences.bit_length(), drafts)) for drafts in (False, True))
        return 1.0 if plain is None or drafted is None else drafted / plain


class Speculator:
    """Makes drafts for the sequences of an engine.

    Raises:
        ValueError: the method is unknown, or the model has no multi-token prediction module.
    """

    def __init__(self, model: Transformer, method: str) -> None:
        if method not in MOST_DRAFTS:
            raise ValueError(f"speculate={method!r} is unknown; choose None, 'mtp' or 'ngram'")
        if method == "mtp" and not len(model.mtp):
            raise ValueError(
                "speculate='mtp' needs a multi-token prediction module, and this model has none; "
                "'ngram' works with every model"
            )
        self.model, self.method = model, method
        self.most = MOST_DRAFTS[method]
        self.layers = 1 if method == "mtp" else 0  # of cache that the module needs beside the model's
        self.clock = Clock()
        self.drafts = self.drafted = self.accepted = 0

    def wants(self, sequence: Sequence) -> bool:
        """Whether to make drafts for it. Not under a grammar, which says what may come only after tokens that have; not
        where routes are recorded, of which drafts would leave theirs."""
        if sequence.pace is None:
            able = sequence.params.speculate and not sequence.params.routes and sequence.grammar is None
            sequence.pace = Pace(paying=able)
        return sequence.pace.paying

    def judge(self, sequence: Sequence, drafted: int, accepted: int, sequences: int) -> None:
        """A step with drafts has been checked."""
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        sequence.drafted += drafted
        sequence.accepted += accepted
        assert sequence.pace is not None
        sequence.pace.judge(drafted, accepted, self.most, self.clock.cost(sequences))

    def read(self, batch: Many[Piece], states_BTD: Tensor, cache: PromptCache) -> None:
        """The module reads pieces of prompts, too: it attends to them later. Each state meets the token that came
        after; after the last token of a sequence there is none yet."""
        if self.method != "mtp":
            return
        B, T, _ = states_BTD.shape
        next_BT = torch.zeros(B, T, dtype=torch.long)
        for row, (sequence, start, count) in enumerate(batch):
            following = sequence.tokens[start + 1 : start + count + 1]
            next_BT[row, : len(following)] = torch.tensor(following)
        self.model.mtp_read(states_BTD, next_BT.to(states_BTD.device), cache)

    def read_flat(self, runner: Runner, work: Many[tuple[Sequence, int]], states_ND: Tensor) -> None:
        """The same for prompts that were read in a flat list: all tokens of each but those that are only drafts, or the
        last, whose follower is still to be drawn."""
        if self.method != "mtp":
            return
        kept: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        place = 0
        for sequence, count in work:
            start = sequence.computed
            following = sequence.tokens[start + 1 : start + count + 1] if count > 1 else []
            kept += range(place, place + len(following))
            rows += [sequence.row] * len(following)
            positions += range(start, start + len(following))
            tokens += following
            place += count + len(sequence.drafts)
        self.model.mtp_decode(states_ND[kept], runner.flat.step(rows, positions, tokens), runner.cache.pools[-1])

    def draft(self, runner: Runner, sequences: Many[Sequence], news: Many[int], states_ND: Tensor) -> None:
        """Give drafts to sequences, each of which has just got `news` tokens, drawn from as many of the states."""
        known = self.clock.knows_plain(len(sequences))
        ready = []
        for s in sequences:
            s.drafts = []
            left = s.max_tokens - s.generated - 1  # the last token needs no draft after it
            go = self.wants(s) and left > 0 and (known or s.generated > PLAIN)
            if go and self.method == "ngram":
                s.drafts = look_up(s, min(self.most, left))
            ready.append(go)
        if self.method == "mtp" and any(self.wants(s) for s in sequences):
            self._mtp(runner, sequences, news, states_ND, ready)

    def _mtp(
        self, runner: Runner, sequences: Many[Sequence], news: Many[int], states_ND: Tensor, ready: Many[bool]
    ) -> None:
        """The module reads the new states with the tokens that came after them; the last of each foretells the next."""
        rows: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        last: list[int] = []
        for s, new in zip(sequences, news, strict=True):
            rows += [s.row] * new
            positions += range(s.computed - new, s.computed)
            tokens += s.tokens[s.computed - new + 1 : s.computed + 1]
            last.append(len(rows) - 1)
        step, pool_PC = runner.flat.step(rows, positions, tokens), runner.cache.pools[-1]
        logits = runner.flat.with_logits(len(rows))
        result_NX = self.model.mtp_decode(states_ND, step, pool_PC, logits)
        going = [place for place, go in zip(last, ready, strict=True) if go]
        if not going:
            return
        if logits:
            drafts_N = largest(result_NX)[1].tolist()
            drafts = [drafts_N[place] for place in going]
        else:
            drafts = largest(self.model.mtp[0].head(result_NX[going]))[1].tolist()  # type: ignore[operator]
        chosen = (s for s, go in zip(sequences, ready, strict=True) if go)
        for s, token in zip(chosen, drafts, strict=True):
            s.drafts = [token]


def look_up(sequence: Sequence, most: int) -> list[int]:
    """What followed the last tokens when they stood in the text before: the longest match of up to LONGEST_GRAM tokens,
    the latest of several."""
    pace, tokens = sequence.pace, sequence.tokens
    assert pace is not None
    for end in range(max(1, pace.seen), len(tokens)):  # remember where what follows tokens[:end] begins
        for length in range(1, LONGEST_GRAM + 1):
            if length <= end:
                pace.grams[tuple(tokens[end - length : end])] = end
    pace.seen = len(tokens)
    for length in range(min(LONGEST_GRAM, len(tokens)), 0, -1):
        place = pace.grams.get(tuple(tokens[-length:]))
        if place is not None:
            return tokens[place : place + most]
    return []
