"""The engine: prompts in, completions out, from the very model object that training updates.

A prompt is prefilled once, however many completions it gets; its cache rows are then copied to each of them. All rows
of a wave decode together, one token a step, with absorbed MLA; finished rows are dropped when enough of them have
gathered.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from luciola import hardware
from luciola.engine.cache import Cache
from luciola.engine.sampler import BLOCK, SamplingParams, Settings, UniformStream, sample
from luciola.model.moe import Routing

if TYPE_CHECKING:
    from luciola.model.language_model import LanguageModel

PREFILL_TOKENS = 8192  # prompt tokens that go through the model in one pass
KEEP_SHARE = 0.75  # rows are gathered anew once fewer than this share of them is still running

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        text: the decoded tokens, without special tokens and without the stop text.
        token_ids: every token generated, the end token included.
        logprobs: log-probability of each token under the model at temperature 1 (with `logprobs=True`).
        tempered_logprobs: the same at the sampling temperature: what a policy-gradient ratio needs.
        finish_reason: "stop" (end token or stop text), "length" (max_tokens or the model's longest context), "abort".
        routes: experts of each prompt and generated token but the last, (T - 1, MoE layers, K) int16 (with
        `routes=True`).
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
    tempered_logprobs: list[float] | None = None
    routes: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    prompt: list[int]
    params: SamplingParams
    sample: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    finish: FinishReason | None = None
    text: str | None = None


class Engine:
    """Batched generation with a `LanguageModel`.

    Args:
        lm: the model; it is used in place, not copied, unless `dtype` asks for another precision.
        dtype: "auto" measures which precision this machine multiplies fastest; "float32", "bfloat16", or "model" to
            take the weights as they are.
        quantize: None: weights as they are. This version has no quantised ones.
        max_cached_tokens: most tokens the cache holds at once; more work is done in waves. None: a quarter of the
            memory that is free now.
    """

    def __init__(
        self,
        lm: LanguageModel,
        dtype: str = "auto",
        quantize: str | None = None,
        max_cached_tokens: int | None = None,
    ) -> None:
        if quantize is not None:
            raise ValueError(f"quantize={quantize!r} is not supported by this version; leave it None")
        if max_cached_tokens is not None and max_cached_tokens < 1:
            raise ValueError(f"max_cached_tokens={max_cached_tokens} must be at least 1, or None")
        self.tokenizer, self.config = lm.tokenizer, lm.config
        self.model = lm.model
        parameter = next(self.model.parameters())
        wanted = parameter.dtype if dtype == "model" else getattr(torch, hardware.choose_dtype(dtype)[0])
        if wanted != parameter.dtype:
            self.model = copy.deepcopy(self.model).to(wanted)
        self.dtype, self.device = wanted, parameter.device
        bytes_per_number = torch.finfo(wanted).bits // 8
        self.cache_bytes_per_token = (
            self.config.cached_per_token_and_layer * self.config.num_hidden_layers * bytes_per_number
        )
        if max_cached_tokens is None:
            max_cached_tokens = max(4096, hardware.available_memory_bytes() // 4 // self.cache_bytes_per_token)
        self.max_cached_tokens = max_cached_tokens
        self._eos = torch.tensor(_end_tokens(lm), dtype=torch.long, device=self.device)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt; result[i] holds the n completions of prompts[i].

        Args:
            prompts: texts, encoded as they are (use `lm.tokenizer.chat` for conversations), or lists of token ids.
            params: one for all prompts, or one for each.

        Raises:
            ValueError: a prompt is empty, has a token outside the vocabulary or leaves no room in the model's context.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list; put the single prompt in brackets")
        rows = self._rows(prompts, params or SamplingParams())
        for wave in self._waves([row for group in rows for row in group]):
            for _ in self._run(wave):
                pass
        return [[self._completion(row) for row in group] for group in rows]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion as it grows; a character is held back until it is whole."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so its tokens cannot be streamed as text; use generate")
        if params is not None and params.n != 1:
            raise ValueError(f"one completion can be streamed, not n={params.n}; use generate")
        ((row,),) = self._rows([prompt], params or SamplingParams())
        decoder = self.tokenizer.stream()
        shown = 0
        held = max((len(s) for s in row.params.stop), default=1) - 1  # a stop text may be arriving piece by piece
        text = ""
        for _ in self._run([row]):
            text += decoder.push(row.tokens[-1])
            end = len(text) - held if row.finish is None else shown
            if end > shown:
                yield text[shown:end]
                shown = end
        text = row.text if row.text is not None else text + decoder.flush()
        if len(text) > shown:
            yield text[shown:]

    def _rows(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[_Row]]:
        settings = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if not all(isinstance(p, SamplingParams) for p in settings):
            raise ValueError("params must be SamplingParams, one for all prompts or one for each")
        if len(settings) != len(prompts):
            raise ValueError(f"{len(settings)} sampling params for {len(prompts)} prompts; give one, or one for each")
        rows = []
        for i, (prompt, p) in enumerate(zip(prompts, settings, strict=True)):
            ids = self._tokens(prompt, i)
            if p.stop and self.tokenizer is None:
                raise ValueError("stop texts need a tokenizer, and this model has none")
            room = self.config.max_position_embeddings - len(ids)
            if room < 1:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens; the model's context of "
                    f"{self.config.max_position_embeddings} leaves no room to answer"
                )
            rows.append([_Row(ids, p, j, min(p.max_tokens, room)) for j in range(p.n)])
        return rows

    def _tokens(self, prompt: str | Sequence[int], i: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer; give prompts as lists of token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            try:
                ids = [operator.index(t) for t in prompt]
            except TypeError as error:
                raise ValueError(f"prompt {i} is neither a text nor a list of token ids (whole numbers)") from error
        if not ids:
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            bad = next(t for t in ids if not 0 <= t < self.config.vocab_size)
            raise ValueError(f"prompt {i} has token {bad}, outside the vocabulary of {self.config.vocab_size}")
        return ids

    def _waves(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Cut the rows, in order, into batches whose cache fits."""
        wave: list[_Row] = []
        longest_prompt = longest_answer = 0
        for row in rows:
            prompt, answer = max(longest_prompt, len(row.prompt)), max(longest_answer, row.max_tokens)
            if wave and (len(wave) + 1) * (prompt + answer) > self.max_cached_tokens:
                yield wave
                wave, prompt, answer = [], len(row.prompt), row.max_tokens
            wave.append(row)
            longest_prompt, longest_answer = prompt, answer
        if wave:
            yield wave

    @torch.inference_mode()
    def _run(self, rows: list[_Row]) -> Iterator[None]:
        """Generate all rows of a wave to their end; yields after every step."""
        cache, states_BD = self._prefill(rows)
        settings = Settings.of([row.params for row in rows])
        streams = [UniformStream(row.params.seed, row.sample, row.prompt) for row in rows]
        positions_B = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        logprobs, routes = any(row.params.logprobs for row in rows), any(row.params.routes for row in rows)
        uniforms_BX = torch.empty(0)
        step = 0
        while True:
            if step % BLOCK == 0:
                uniforms_BX = torch.from_numpy(np.stack([s.block() for s in streams])).to(self.device)
            logits_BV = self.model.lm_head(states_BD).float()
            drawn = sample(logits_BV, settings, uniforms_BX[:, step % BLOCK], logprobs)
            self._record(rows, drawn.tokens, drawn.logprobs, drawn.tempered_logprobs)
            yield
            running = [b for b, row in enumerate(rows) if row.finish is None]
            if not running:
                return
            tokens_B = drawn.tokens
            if len(running) < KEEP_SHARE * len(rows):
                kept = torch.tensor(running, device=self.device)
                cache.keep(kept)
                rows, streams = [rows[b] for b in running], [streams[b] for b in running]
                settings, uniforms_BX = settings.keep(kept), uniforms_BX[kept]
                tokens_B, positions_B = tokens_B[kept], positions_B[kept]
            cache.grow()
            states_BD, routings = self.model.decode(tokens_B, positions_B, cache.views(), cache.mask_BS())
            if routes and routings:
                self._record_routes(rows, routings)
            positions_B = positions_B + 1
            step += 1

    def _prefill(self, rows: list[_Row]) -> tuple[Cache, Tensor]:
        """Run each distinct prompt once; returns the filled cache and every row's last state (B, D)."""
        groups: list[list[_Row]] = []
        for row in rows:
            if groups and groups[-1][0].prompt is row.prompt:
                groups[-1].append(row)
            else:
                groups.append([row])
        prompts = [group[0].prompt for group in groups]
        longest = max(map(len, prompts))
        columns = longest + max(row.max_tokens for row in rows)
        C, layers = self.config.cached_per_token_and_layer, self.config.num_hidden_layers
        filled = [torch.empty(len(prompts), longest, C, dtype=self.dtype, device=self.device) for _ in range(layers)]
        states = []
        per_pass = max(1, PREFILL_TOKENS // longest)
        for start in range(0, len(prompts), per_pass):
            part = slice(start, start + per_pass)
            tokens_BT = torch.zeros(len(prompts[part]), longest, dtype=torch.long, device=self.device)
            for i, prompt in enumerate(prompts[part]):
                tokens_BT[i, : len(prompt)] = torch.tensor(prompt)
            states_BTD, routings = self.model.hidden(tokens_BT, caches=[layer[part] for layer in filled])
            last = torch.tensor([len(prompt) - 1 for prompt in prompts[part]], device=self.device)
            states.append(states_BTD[torch.arange(len(last), device=self.device), last])
            self._record_prompt_routes(groups[part], routings)
        cache = Cache(self.config, len(rows), columns, self.dtype, self.device)
        copies = [len(group) for group in groups]
        cache.fill(filled, [len(prompt) for prompt in prompts], copies)
        return cache, torch.cat(states).repeat_interleave(torch.tensor(copies, device=self.device), dim=0)

    def _record(self, rows: list[_Row], tokens: Tensor, logprobs: Tensor | None, tempered: Tensor | None) -> None:
        ended = torch.isin(tokens, self._eos).tolist()
        ids = tokens.tolist()
        plain = logprobs.tolist() if logprobs is not None else None
        warm = tempered.tolist() if tempered is not None else None
        for b, row in enumerate(rows):
            if row.finish is not None:
                continue
            row.tokens.append(ids[b])
            if plain is not None and warm is not None and row.params.logprobs:
                row.logprobs.append(plain[b])
                row.tempered.append(warm[b])
            if (ended[b] and not row.params.ignore_eos) or (row.params.stop and self._stopped(row)):
                row.finish = "stop"
            elif len(row.tokens) >= row.max_tokens:
                row.finish = "length"

    def _stopped(self, row: _Row) -> bool:
        """Whether the newest token completed a stop text; if so, fixes the row's text."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(row.tokens)
        places = [place for stop in row.params.stop if (place := text.find(stop)) >= 0]
        if places:
            row.text = text[: min(places)]
        return bool(places)

    def _record_prompt_routes(self, groups: list[list[_Row]], routings: list[Routing]) -> None:
        if not routings or not any(row.params.routes for group in groups for row in group):
            return
        indices_BTLK = torch.stack([r.indices_BTK for r in routings], dim=2).short()
        for i, group in enumerate(groups):
            for row in group:
                if row.params.routes:
                    row.routes.append(indices_BTLK[i, : len(row.prompt)])

    def _record_routes(self, rows: list[_Row], routings: list[Routing]) -> None:
        indices_BLK = torch.stack([r.indices_BTK[:, 0] for r in routings], dim=1).short()
        for row, indices_LK in zip(rows, indices_BLK, strict=True):
            if row.finish is None and row.params.routes:
                row.routes.append(indices_LK.unsqueeze(0))

    def _completion(self, row: _Row) -> Completion:
        if row.text is None:
            row.text = "" if self.tokenizer is None else self.tokenizer.decode(row.tokens)
        return Completion(
            text=row.text,
            token_ids=row.tokens,
            finish_reason=row.finish or "abort",
            logprobs=row.logprobs if row.params.logprobs else None,
            tempered_logprobs=row.tempered if row.params.logprobs else None,
            routes=torch.cat(row.routes) if row.routes else None,
        )


def _end_tokens(lm: LanguageModel) -> list[int]:
    """Every token that ends a text, by the tokenizer's word or the configuration's."""
    ends = set(lm.tokenizer.eos_token_ids) if lm.tokenizer is not None else set()
    configured = lm.config.eos_token_id
    if configured is not None:
        ends |= {configured} if isinstance(configured, int) else set(configured)
    return sorted(ends)
