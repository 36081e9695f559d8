"""What one step of the engine does: run the model on what the scheduler has planned, draw tokens, take note of them.

A step has up to two passes through the model. Pieces of prompts go through `Transformer.hidden`, whole sequences at a
time; tokens that continue a sequence, with its drafts, and the short rests of prompts go through `Transformer.decode`,
all in one flat list. The states that something is to be drawn from then meet the head together.

Shapes: N tokens, B rows to draw for, D hidden, V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luciola.engine.cache import PagedCache, Piece, PromptCache
from luciola.engine.expert_load import ExpertLoad
from luciola.engine.params import SamplingParams
from luciola.engine.sampler import History, NotFiniteError, NothingAllowedError, Sampled, Settings, sample, score
from luciola.engine.scheduler import Scheduler
from luciola.engine.sequence import Sequence
from luciola.engine.steps import Steps
from luciola.model.logprobs import CHUNK_NUMBERS
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from luciola.engine.speculate import Speculator


_NO_NUMBERS = torch.empty(0)
_ANYTHING = SamplingParams(temperature=0.0)  # for a row that has failed: what is drawn for it is thrown away


class Ready:
    """The sequences that a step draws for: of each, so many states in a row, one for its next token and one for each of
    its drafts."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.counts: list[int] = []
        self.parts: list[Tensor] = []
        self.logits: Tensor | None = None  # of all states, where the pass has computed them, too

    def take(self, states_ND: Tensor, kept: list[int], logits_NV: Tensor | None = None) -> None:
        """Add the states of a pass that are drawn from."""
        whole = kept == list(range(len(states_ND)))
        self.logits = logits_NV if whole and not self.parts else None
        self.parts.append(states_ND if whole else states_ND[kept])

    def states(self) -> Tensor:
        """All of them, (B, D)."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


class Runner:
    """Runs steps of one model over one cache."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler,
        cache: PagedCache,
        ends: Iterable[int],
        speculator: Speculator | None = None,
        publish: bool = True,
        exact: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.scheduler, self.cache, self.speculator = scheduler, cache, speculator
        self.ends, self.publishes, self.exact = tuple(ends), publish, exact
        self.device = cache.device
        self.prompt_tokens = self.generated_tokens = self.steps = 0
        self.read_tokens, self.step_sizes = 0, [0] * 64
        self.grammar_tokens, self.grammar_seconds = 0, 0.0
        self._settings: tuple[list[Sequence], Settings] = ([], Settings.of([]))
        self.flat = Steps(model, cache)
        self.expert_load = ExpertLoad(model)

    @torch.inference_mode()
    def step(self) -> None:
        """Continue every running sequence by a token or more, or by a piece of its prompt."""
        began = time.perf_counter()
        work = self.scheduler.plan()
        for sequence in self.scheduler.running:
            self.cache.follow(sequence)
        drafts = any(sequence.drafts for sequence in work.short)
        short = [(sequence, sequence.pending) for sequence in work.short]
        decoding = not work.pieces and all(pending == 1 for _, pending in short)
        pieces = work.pieces
        if self.exact:  # prompts, too, by the kernels of decoding
            short, pieces = [*short, *pieces], []
        plain = decoding and not drafts
        read = len(short) if plain else sum(count + len(sequence.drafts) for sequence, count in (*short, *pieces))
        self.read_tokens += read
        self.step_sizes[read.bit_length()] += 1
        ready = Ready()
        if pieces:
            self._read(pieces, ready)
        if short:
            self._continue(short, ready)
        touched = ready.sequences
        if touched:
            self._draw(ready)
        self.steps += 1
        if self.speculator is not None and decoding:
            self.speculator.clock.note(len(work.short), drafts, time.perf_counter() - began)
        ended = [sequence for sequence in touched if sequence.ended]
        for sequence in touched:
            if sequence.listener is not None and not sequence.ended:
                sequence.tell(self.tokenizer)
        if ended:
            self.finish(ended)

    def _read(self, pieces: Many[tuple[Sequence, int]], ready: Ready) -> None:
        """Read pieces of prompts, whole sequences at a time."""
        for batch in _batches([Piece(sequence, sequence.computed, count) for sequence, count in pieces]):
            width = max(piece.length for piece in batch)
            tokens_BT = torch.zeros(len(batch), width, dtype=torch.long)
            for row, (sequence, start, count) in enumerate(batch):
                tokens_BT[row, :count] = torch.tensor(sequence.tokens[start : start + count])
            cache = PromptCache(self.cache, batch, width)
            states_BTD, routings = self.model.hidden(tokens_BT.to(self.device), cache=cache)
            if self.speculator is not None:
                self.speculator.read(batch, states_BTD, cache)
            lengths_B1 = torch.tensor([[piece.length] for piece in batch])
            self.expert_load.add(routings, torch.arange(width) < lengths_B1)
            routes_BTLK = _stacked(routings, batch)
            kept: list[int] = []
            for row, (sequence, _, count) in enumerate(batch):
                if routes_BTLK is not None:
                    _record_routes(sequence, routes_BTLK[row], 0, count)
                if sequence.scores_prompt:
                    self._score(sequence, states_BTD[row, :count])
                self._advance(sequence, count)
                if sequence.pending == 0:
                    self._ready(sequence, range(row * width + count - 1, row * width + count), kept, ready)
            ready.take(states_BTD.flatten(0, 1), kept)
            self.prompt_tokens += sum(piece.length for piece in batch)

    def _continue(self, work: Many[tuple[Sequence, int]], ready: Ready) -> None:
        """One flat pass over so many tokens of each sequence, and over the drafts of those that are thereby read to
        their end."""
        fed: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        for sequence, count in work:
            start = sequence.computed
            if count == 1 and not sequence.drafts:  # nearly everybody, nearly always
                fed.append(sequence.tokens[start])
                rows.append(sequence.row)
                positions.append(start)
                continue
            tokens = sequence.tokens[start : start + count] + sequence.drafts
            fed += tokens
            rows += [sequence.row] * len(tokens)
            positions += range(start, start + len(tokens))
        step = self.flat.step(rows, positions, fed)
        all_drawn = self.flat.with_logits(len(fed)) and all(count == 1 for _, count in work)
        states_ND, routings, logits_NV = self.model.decode(step, self.cache.pools, self.exact, logits=all_drawn)
        if self.speculator is not None and any(count > 1 for _, count in work):
            self.speculator.read_flat(self, work, states_ND)
        self.expert_load.add(routings)
        routes_NLK = _stacked(routings, work)
        kept: list[int] = []
        place = 0
        for sequence, count in work:
            end = place + count + len(sequence.drafts)
            if routes_NLK is not None:
                _record_routes(sequence, routes_NLK, place, count)
            if count > 1 or len(sequence.tokens) == sequence.prompt_length:
                self.prompt_tokens += count
                if sequence.scores_prompt:
                    self._score(sequence, states_ND[place : place + count])
            self._advance(sequence, count)
            if sequence.computed == len(sequence.tokens):
                self._ready(sequence, range(place + count - 1, end), kept, ready)
            place = end
        ready.take(states_ND, kept, logits_NV)

    def _ready(self, sequence: Sequence, states: range, kept: list[int], ready: Ready) -> None:
        """Something can be drawn for it, and for those that waited for the same prompt to be read."""
        ready.sequences.append(sequence)
        ready.counts.append(len(states))
        kept.extend(states)
        if not sequence.followers:
            return
        copies = []
        for follower in sequence.followers:
            follower.leader, follower.cached_tokens = None, sequence.cached_tokens
            follower.prompt_logprobs, follower.prompt_top = list(sequence.prompt_logprobs), list(sequence.prompt_top)
            pair = self.scheduler.fork(sequence, follower)
            if pair is not None:
                copies.append(pair)
            if follower.row >= 0:
                follower.routes, follower.routed = list(sequence.routes), sequence.routed
                self.cache.follow(follower)
                ready.sequences.append(follower)
                ready.counts.append(1)
                kept.append(states[0])
        sequence.followers = []
        if copies:
            self.cache.copy(copies)

    def _score(self, sequence: Sequence, states_ND: Tensor) -> None:
        """Record the log-probabilities of the prompt's tokens that follow these states, the first at `computed`."""
        start, first = sequence.computed, len(sequence.prompt_logprobs)
        behind = min(start + len(states_ND) + 1, sequence.prompt_length)
        rows = max(1, CHUNK_NUMBERS // self.model.config.vocab_size)
        for place in range(first, behind, rows):
            end = min(place + rows, behind)
            logits_NV = self.model.head(states_ND[place - 1 - start : end - 1 - start], exact=self.exact)
            targets_N = torch.tensor(sequence.tokens[place:end], device=logits_NV.device)
            try:
                logps, likeliest = score(logits_NV, targets_N, sequence.params.prompt_logprobs or 0)
            except NotFiniteError as error:
                sequence.error = error
                return
            sequence.prompt_logprobs += logps
            sequence.prompt_top += likeliest

    def take(self, model: Transformer) -> None:
        """Go on with this model, whose weights are others."""
        self.model = model
        self.flat = Steps(model, self.cache)
        if self.speculator is not None:
            self.speculator.model = model

    def _advance(self, sequence: Sequence, count: int) -> None:
        sequence.computed += count
        if self.publishes and sequence.computed // self.cache.block_size > len(sequence.keys):
            self.scheduler.publish(sequence)

    def _draw(self, ready: Ready) -> None:
        """Draw the next tokens and take note of them."""
        sequences, counts, states_BD = ready.sequences, ready.counts, ready.states()
        logits_BV = self.model.head(states_BD, exact=self.exact) if ready.logits is None else ready.logits
        rows = sequences
        if len(logits_BV) > len(sequences):
            rows = [sequence for sequence, count in zip(sequences, counts, strict=True) for _ in range(count)]
        drawn = self._sample(logits_BV, rows)
        news = self._record(sequences, counts, drawn)
        if self.speculator is not None:
            self._speculate(sequences, counts, news, states_BD)

    def _sample(self, logits_BV: Tensor, rows: list[Sequence]) -> Sampled:
        """Draw a token from each row of logits; a sequence whose logits or grammar fail keeps that error, and what is
        drawn for it counts for nothing."""
        if self._settings[0] != rows:
            self._settings = (rows, Settings.of([s.params for s in rows], self.ends, self.device))
        settings = self._settings[1]
        numbers: list[float] = []
        histories: list[History | None] = []
        allowed: dict[int, Tensor] = {}
        before, offset = None, 0  # a sequence has further rows where its drafts are checked
        for row, sequence in enumerate(rows):
            offset = offset + 1 if sequence is before else 0
            before = sequence
            if settings.draws:
                numbers.append(sequence.stream.number(sequence.generated + offset))
            if settings.edits:
                history = sequence.history
                histories.append(history and history.followed_by(sequence.drafts[:offset]) if offset else history)
            if sequence.grammar is not None or sequence.thinking is not None:
                try:
                    mask_V = sequence.allowed_V(logits_BV.shape[1], offset)
                except Exception as error:
                    sequence.error = error
                    continue
                if mask_V is not None:
                    allowed[row] = mask_V
        uniform_B = torch.tensor(numbers, device=self.device) if settings.draws else _NO_NUMBERS
        logprobs = any(sequence.params.logprobs for sequence in rows)
        while True:
            try:
                return sample(logits_BV, settings, uniform_B, logprobs, histories, allowed)
            except (NotFiniteError, NothingAllowedError) as error:
                for row in error.rows:
                    rows[row].error = type(error)([row])
                    logits_BV[row] = 0.0
                    allowed.pop(row, None)
                    histories[row : row + 1] = [None] * len(histories[row : row + 1])
                settings = Settings.of(
                    [_ANYTHING if s.error is not None else s.params for s in rows], self.ends, self.device
                )

    def _record(self, sequences: list[Sequence], counts: list[int], drawn: Sampled) -> list[int]:
        """Append what was drawn, drafts as far as they are right; returns the number of new tokens of each."""
        ids = drawn.tokens.tolist()
        plain = drawn.logprobs.tolist() if drawn.logprobs is not None else None
        warm = drawn.tempered_logprobs.tolist() if drawn.tempered_logprobs is not None else None
        news = []
        place = 0
        for sequence, count in zip(sequences, counts, strict=True):
            params, drafts, new = sequence.params, sequence.drafts, 0
            for number in range(place, place + count):
                if sequence.error is not None:
                    break
                token = ids[number]
                if plain is not None and warm is not None and params.logprobs:
                    sequence.logprobs.append(plain[number])
                    sequence.tempered.append(warm[number])
                    if params.top_logprobs:
                        assert drawn.top_logprobs is not None
                        sequence.top.append(dict(drawn.top_logprobs[number]))
                    if params.kept_tokens:
                        assert drawn.kept is not None
                        sequence.kept.append(drawn.kept[number])
                sequence.tokens.append(token)
                new += 1
                self._look(sequence, token)
                if sequence.ended or new == count or drafts[new - 1] != token:
                    break
                # What was drawn behind a draft does not know that a token is forced there: the next step sees to it.
                if sequence.thinking is not None and sequence.thinking.forced(sequence.grammar) is not None:
                    break
            place += count
            self.generated_tokens += new
            if new > 1:
                self._advance(sequence, new - 1)
            news.append(new)
        return news

    def _look(self, sequence: Sequence, token: int) -> None:
        """Whether the newest token ends its sequence; everybody who follows the tokens is told of it."""
        params = sequence.params
        end = token in self.ends and not params.ignore_eos
        try:
            if sequence.history is not None:
                sequence.history.push(token)
            if sequence.thinking is not None:
                sequence.thinking.accept(token)
                if sequence.thinking.over:
                    sequence.thinking = None
            if sequence.grammar is not None and not end:
                sequence.grammar.accept(token)
            writer = sequence.writer
            silent = not params.skip_special_tokens and self._silent(token, params, end)
            stopped = writer is not None and not silent and writer.push(token)
        except Exception as error:
            sequence.error = error
            return
        complete = sequence.grammar is not None and sequence.grammar.finished
        if end or stopped or complete or token in params.stop_token_ids:
            sequence.finish = "stop"
            if not end and token in params.stop_token_ids:
                sequence.stop_reason = token
            elif not end and stopped and writer is not None:
                sequence.stop_reason = writer.stop
        elif sequence.generated >= sequence.max_tokens:
            sequence.finish = "length"

    def _silent(self, token: int, params: SamplingParams, end: bool) -> bool:
        """Whether it is a special token that ends its text, which has no place there though others have."""
        ends = end or token in params.stop_token_ids
        return ends and self.tokenizer is not None and self.tokenizer.decode([token]) == ""

    def _speculate(self, sequences: list[Sequence], counts: list[int], news: list[int], states_BD: Tensor) -> None:
        """Judge the drafts of the step that is over; make those of the next one."""
        assert self.speculator is not None
        kept: list[int] = []
        offset = 0
        going, going_news = [], []
        for sequence, count, new in zip(sequences, counts, news, strict=True):
            if count > 1:
                self.speculator.judge(sequence, count - 1, new - 1, len(sequences))
            if not sequence.ended:
                kept += range(offset, offset + new)
                going.append(sequence)
                going_news.append(new)
            offset += count
        if going:
            states_ND = states_BD if len(kept) == offset else states_BD[kept]
            self.speculator.draft(self, going, going_news, states_ND)

    def finish(self, sequences: Many[Sequence]) -> None:
        """These have ended: their blocks come back, those who waited for their prompt read it themselves, whoever
        listens is told."""
        self.scheduler.leave(sequences)
        for sequence in sequences:
            if sequence.writer is not None and sequence.error is None:
                sequence.writer.end()
            if sequence.leader is not None:
                sequence.leader.followers.remove(sequence)
                sequence.leader = None
            heirs = [follower for follower in sequence.followers if not follower.ended]
            for follower in sequence.followers:
                follower.leader = None
            sequence.followers = []
            if heirs:
                heirs[0].followers = heirs[1:]
                for follower in heirs[1:]:
                    follower.leader = heirs[0]
                self.scheduler.add(heirs[0])
            if sequence.grammar is not None:
                self.grammar_tokens += sequence.grammar.tokens
                self.grammar_seconds += sequence.grammar.seconds
            if sequence.listener is not None:
                sequence.tell(self.tokenizer)
            sequence.done = True  # last of all: threads that wait for it look here without the lock

    def counts(self) -> dict[str, int | float]:
        """What has been done so far."""
        speculator = self.speculator
        return {
            "steps": self.steps,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.scheduler.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "read_tokens": self.read_tokens,
            "drafts": speculator.drafts if speculator is not None else 0,
            "drafted": speculator.drafted if speculator is not None else 0,
            "accepted": speculator.accepted if speculator is not None else 0,
            "grammar_tokens": self.grammar_tokens,
            "grammar_seconds": self.grammar_seconds,
        }


def _stacked(routings: Many[Routing], work: Many[tuple[Sequence, int]] | Many[Piece]) -> Tensor | None:
    """The experts of all layers side by side, (..., L, K) int16, where anybody wants to know."""
    if not routings or not any(entry[0].params.routes for entry in work):
        return None
    return torch.stack([routing.indices_BTK.short() for routing in routings], dim=-2)


def _record_routes(sequence: Sequence, routes_NLK: Tensor, place: int, count: int) -> None:
    """Keep the experts of its `count` tokens from `computed` on, which begin at `place`, as far as they are not known
    from before it gave way."""
    new = sequence.computed + count - sequence.routed
    if new > 0 and sequence.params.routes:
        sequence.routes.append((routes_NLK, place + count - new, place + count))
        sequence.routed += new


def _batches(pieces: list[Piece]) -> list[list[Piece]]:
    """Whole prompts of like length together, as long as little is padded; pieces with a past alone."""
    batches: list[list[Piece]] = []
    for piece in sorted((p for p in pieces if p.start == 0), key=lambda p: -p.length):
        if batches and 2 * piece.length >= batches[-1][0].length:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches + [[piece] for piece in pieces if piece.start > 0]
