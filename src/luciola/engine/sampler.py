"""From logits to the next token, and randomness that belongs to the request alone.

    logits -> -inf where the grammar or min_tokens forbids a token
           -> logit bias -> repetition, presence and frequency penalty        (of the rows that ask for any)
           -> / temperature -> softmax -> top-k -> top-p -> min-p
           -> inverse transform, in order of token ids, of one uniform number a step

Recorded log-probabilities are those of the model itself, before any of this; the tempered ones know the temperature and
nothing else.

The numbers of sample j of a request come from a Philox stream keyed by (seed, j, prompt), so a request's randomness
does not depend on what else is in the batch, and different prompts of one call do not share their luck. Nor does
anything else of a row: every float32 result is the same bit for bit whatever its neighbours are. Hence no `sum` over
the vocabulary here, which PyTorch splits among threads when there is one row and not when there are many; `softmax`,
`cumsum`, `topk` and maxima go row by row.

Shapes: B rows (samples being generated), C rows of some kind, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from luciola.engine.params import SamplingParams

BLOCK = 64  # uniform numbers drawn from a stream at a time
HOT = 1e30  # temperatures above are taken as this: float32 would make some of them infinite
COLD = 1e-6  # temperatures below are taken as 0: logits divided by them can overflow
SMALL = 1e-30  # smaller top_p could round to 0, which keeps nothing; the likeliest token alone reaches either
CANDIDATES = 256  # likeliest tokens that top-k, top-p and min-p look at first
HEIGHT = 16  # of the table in which the largest of many numbers are looked for
MORE = 16  # times as many when those were too few


class NotFiniteError(ValueError):
    """The model's logits are infinite or NaN, so that there is nothing to sample from.

    Attributes:
        rows: the rows of the batch for which this is so.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            "the model's logits are not finite numbers: its weights are damaged, or their training went astray"
        )


class NothingAllowedError(ValueError):
    """The grammar or min_tokens leaves no token to draw.

    Attributes:
        rows: the rows of the batch for which this is so.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__("no token may come next: the grammar, or min_tokens with its stop tokens, forbids all of them")


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from (seed, step, item, ...): the same parts, the same seed, on every machine."""
    state = np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class UniformStream:
    """The uniform numbers of one sample, float32 in [0, 1)."""

    def __init__(self, seed: int | None, sample: int, prompt: Sequence[int]) -> None:
        digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=8).digest()
        entropy = secrets.randbits(64) if seed is None else seed % 2**64
        key = np.random.SeedSequence((entropy, sample, int.from_bytes(digest, "little")))
        self._generator = np.random.Generator(np.random.Philox(key))
        self._numbers: list[float] = []

    def number(self, i: int) -> float:
        """Number i of the stream, however often and in whatever order it is asked for."""
        while i >= len(self._numbers):
            self._block()
        return self._numbers[i]

    def _block(self) -> None:
        """Draw the next BLOCK numbers."""
        self._numbers += self._generator.random(BLOCK, dtype=np.float32).tolist()


class History:
    """What penalties and min_tokens need to know of a sequence: its distinct tokens, how often each was generated.

    Attributes:
        length: tokens generated so far.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self.length = 0
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.zeros(2 * len(self._slots) + 64, dtype=np.int64)
        self._tokens[: len(self._slots)] = list(self._slots)
        self._counts = np.zeros(len(self._tokens), dtype=np.float32)

    def push(self, token: int) -> None:
        """Add one generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[slot] = token
        self._counts[slot] += 1
        self.length += 1

    def followed_by(self, tokens: Iterable[int]) -> History:
        """A copy that has generated `tokens` besides: what a position behind drafted tokens sees."""
        copy = History(())
        copy.length, copy._slots = self.length, self._slots.copy()
        copy._tokens, copy._counts = self._tokens.copy(), self._counts.copy()
        for token in tokens:
            copy.push(token)
        return copy

    def columns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The distinct tokens of prompt and completion, int64, and how often each was generated, float32."""
        used = len(self._slots)
        tokens, counts = torch.from_numpy(self._tokens[:used]), torch.from_numpy(self._counts[:used])
        return tokens.to(device), counts.to(device)


class _Edit:
    """What one request changes about its logits before the temperature."""

    def __init__(self, params: SamplingParams, ends: Sequence[int], device: torch.device) -> None:
        self.params = params
        bias = dict(params.logit_bias)
        barred = {*params.stop_token_ids, *(() if params.ignore_eos else ends)} if params.min_tokens else ()
        self.barred = torch.tensor(sorted(barred), dtype=torch.long, device=device)
        self.biased = torch.tensor(list(bias), dtype=torch.long, device=device)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def apply(self, logits_V: Tensor, history: History | None) -> None:
        """Change one row in place, touching only the tokens concerned."""
        params = self.params
        if history is None and params.needs_history:
            raise ValueError("a row with penalties or min_tokens needs its History; give `histories`, one for each row")
        if history is not None and history.length < params.min_tokens:
            logits_V[self.barred] = -torch.inf
        if len(self.biased):
            logits_V[self.biased] += self.bias
        if history is not None and params.penalises:
            tokens, counts = history.columns(logits_V.device)
            logits = logits_V[tokens]
            if params.repetition_penalty != 1.0:
                penalty = float(params.repetition_penalty)
                logits = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits -= float(params.presence_penalty) * (counts > 0) + float(params.frequency_penalty) * counts
            logits_V[tokens] = logits


@dataclass(frozen=True, slots=True)
class Settings:
    """The sampling parameters of a batch, gathered once and used until the batch changes.

    Every row is in one of three kinds: greedy (the likeliest token), plain (drawn from all tokens), or cut (drawn from
    those that top-k, top-p and min-p leave).
    """

    temperature_B1: Tensor | None  # None: 1 everywhere
    greedy: Tensor
    plain: Tensor
    cut: Tensor
    top_k_C1: Tensor  # of the cut rows
    top_p_C1: Tensor
    min_p_C1: Tensor
    edits: tuple[tuple[int, _Edit], ...]
    top_logprobs: tuple[tuple[int, int], ...]  # (row, how many)
    kept: tuple[int, ...] = ()  # rows whose kept tokens are recorded
    draws: bool = True  # whether any row needs a random number

    @classmethod
    def of(
        cls, rows: Sequence[SamplingParams], ends: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> Settings:
        """Gather the settings of each row; `ends` are the model's end tokens."""
        device = torch.device(device)
        kinds: dict[str, list[int]] = {"greedy": [], "plain": [], "cut": []}
        for b, p in enumerate(rows):
            whole = p.top_k == 0 and p.top_p >= 1.0 and p.min_p <= 0.0
            kinds["greedy" if p.temperature < COLD else "plain" if whole else "cut"].append(b)
        temperatures = [min(float(p.temperature), HOT) if p.temperature >= COLD else 1.0 for p in rows]
        cut = [rows[b] for b in kinds["cut"]]
        edits: dict[int, _Edit] = {}  # by identity: the samples of a request share one
        for p in rows:
            if id(p) not in edits and (p.needs_history or p.logit_bias):
                edits[id(p)] = _Edit(p, ends, device)
        return cls(
            temperature_B1=None if set(temperatures) <= {1.0} else torch.tensor(temperatures, device=device)[:, None],
            **{kind: torch.tensor(members, dtype=torch.long, device=device) for kind, members in kinds.items()},
            top_k_C1=torch.tensor([int(p.top_k) for p in cut], dtype=torch.long, device=device)[:, None],
            top_p_C1=torch.tensor([max(float(p.top_p), SMALL) for p in cut], device=device)[:, None],
            min_p_C1=torch.tensor([float(p.min_p) for p in cut], device=device)[:, None],
            edits=tuple((b, edits[id(p)]) for b, p in enumerate(rows) if id(p) in edits),
            top_logprobs=tuple((b, int(p.top_logprobs)) for b, p in enumerate(rows) if p.top_logprobs),
            kept=tuple(b for b, p in enumerate(rows) if p.kept_tokens),
            draws=len(kinds["greedy"]) < len(rows),
        )


class Kept(NamedTuple):
    """The tokens that top-k, top-p and min-p left to draw from, ids ascending, and the log-probability of the one drawn
    among them, at the sampling temperature."""

    ids: Tensor
    logprob: float


class Sampled(NamedTuple):
    """The tokens drawn, (B,) int64; their log-probability under the model, and at the sampling temperature, (B,)
    float32; and by row the likeliest tokens with theirs, the likeliest first, and what the cuts left, for the rows that
    ask. All but the tokens are None where nothing is recorded."""

    tokens: Tensor
    logprobs: Tensor | None = None
    tempered_logprobs: Tensor | None = None
    top_logprobs: dict[int, list[tuple[int, float]]] | None = None
    kept: dict[int, Kept] | None = None


def sample(
    logits_BV: Tensor,
    settings: Settings,
    uniform_B: Tensor,
    logprobs: bool = False,
    histories: Sequence[History | None] = (),
    allowed: Mapping[int, Tensor] | None = None,
) -> Sampled:
    """Draw one token a row.

    Args:
        logits_BV: float32; not changed.
        settings: of these rows.
        uniform_B: a number in [0, 1) for each row; not looked at where none `draws`.
        logprobs: record log-probabilities, and the likeliest tokens of rows that ask for them.
        histories: what each row has generated; None for rows without penalties and min_tokens, or () without any.
        allowed: by row, the tokens its grammar allows, (V,) bool; rows without a grammar are not in it.

    Raises:
        NotFiniteError: a row's logits are infinite or NaN.
        NothingAllowedError: a row's logits are fine, but it may draw no token.
    """
    scores_BV = _edited(logits_BV, settings, histories, allowed or {})
    if not (logprobs or settings.draws):
        best_B, tokens_B = largest(scores_BV)
        if not all(map(math.isfinite, best_B.tolist())):
            _check(best_B.isfinite(), logits_BV, scores_BV)
        return Sampled(tokens_B)
    p_BV = _softmax(scores_BV, settings.temperature_B1)
    _check(p_BV[:, 0].isfinite(), logits_BV, scores_BV)  # one bad number makes the whole row NaN
    left: list[Tensor] | None = None
    tokens_B = torch.empty(len(logits_BV), dtype=torch.long, device=logits_BV.device)
    if len(rows := settings.greedy):
        tokens_B[rows] = largest(_rows(scores_BV, rows))[1]
    if len(rows := settings.plain):
        tokens_B[rows] = _draw(_rows(p_BV, rows), uniform_B[rows])
    if len(rows := settings.cut):
        p_CV, limits = _rows(p_BV, rows), (settings.top_k_C1, settings.top_p_C1, settings.min_p_C1)
        left = [torch.empty(0)] * len(rows) if settings.kept else None
        tokens_B[rows] = _draw_from_head(p_CV, *limits, uniform_B[rows], left)
    if not logprobs:
        return Sampled(tokens_B)
    kept = {}
    if settings.kept:
        of_row = dict(zip(settings.cut.tolist(), left or [], strict=True))
        for b in settings.kept:  # rows that nothing cuts keep every token they may draw at all
            ids = of_row[b] if b in of_row else (p_BV[b] > 0).nonzero().squeeze(1)
            if b in settings.greedy:
                ids = tokens_B[b : b + 1]
            kept[b] = Kept(ids, float((p_BV[b, tokens_B[b]] / p_BV[b, ids].sum()).log()))
    if scores_BV is not logits_BV:
        p_BV = _softmax(logits_BV, settings.temperature_B1)
    plain_B = tempered_B = _logprobs(logits_BV, p_BV, tokens_B[:, None], settings.temperature_B1).squeeze(1)
    if settings.temperature_B1 is not None:
        p_BV = logits_BV.softmax(-1)
        plain_B = _logprobs(logits_BV, p_BV, tokens_B[:, None]).squeeze(1)
    top = {b: _likeliest(logits_BV[b], p_BV[b], k) for b, k in settings.top_logprobs}
    return Sampled(tokens_B, plain_B, tempered_B, top, kept)


def largest(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row and its place, (B,): the first of several; NaN where a row has one."""
    if not x_BV.is_cpu or x_BV.dtype is not torch.float32:
        values_B, places_B = x_BV.max(-1)
        return values_B, places_B
    rows = x_BV.numpy()  # several times faster than PyTorch's
    return torch.from_numpy(rows.max(-1)), torch.from_numpy(rows.argmax(-1))


def _edited(
    logits_BV: Tensor, settings: Settings, histories: Sequence[History | None], allowed: Mapping[int, Tensor]
) -> Tensor:
    """The logits after masks, bias and penalties; the very same tensor where no row has any."""
    if not settings.edits and not allowed:
        return logits_BV
    scores_BV = logits_BV.clone()
    for b, allowed_V in allowed.items():
        scores_BV[b].masked_fill_(~allowed_V, -torch.inf)
    for b, edit in settings.edits:
        edit.apply(scores_BV[b], histories[b] if histories else None)
    return scores_BV


def _softmax(logits_BV: Tensor, temperature_B1: Tensor | None) -> Tensor:
    if temperature_B1 is None:
        return logits_BV.softmax(-1)
    p_BV = logits_BV / temperature_B1
    return torch.softmax(p_BV, -1, out=p_BV)  # another tensor of this size would cost as much as the arithmetic


def _rows(x_BV: Tensor, rows: Tensor) -> Tensor:
    """Some rows, in ascending order; no copy where they are all."""
    return x_BV if len(rows) == len(x_BV) else x_BV[rows]


def _check(fine_B: Tensor, logits_BV: Tensor, scores_BV: Tensor) -> None:
    if bool(fine_B.all()):
        return
    bad = (~fine_B).nonzero().squeeze(1)
    forbidden = logits_BV[bad].amax(-1).isfinite() & (scores_BV[bad].amax(-1) == -torch.inf)
    if bool(forbidden.all()):
        raise NothingAllowedError(bad.tolist())
    raise NotFiniteError(bad[~forbidden].tolist())


def _draw(p_CK: Tensor, uniform_C: Tensor) -> Tensor:
    """Inverse transform: the first place at which the cumulative sum exceeds the number's share of the total."""
    cumulative_CK = p_CK.cumsum(-1)
    total_C1 = cumulative_CK[:, -1:]
    # Rounding can lift the product onto the total, above which nothing lies.
    threshold_C1 = torch.minimum(uniform_C[:, None] * total_C1, total_C1.nextafter(total_C1.new_zeros(())))
    return torch.searchsorted(cumulative_CK, threshold_C1, right=True).squeeze(1)


def _draw_from_head(
    p_CV: Tensor,
    top_k_C1: Tensor,
    top_p_C1: Tensor,
    min_p_C1: Tensor,
    uniform_C: Tensor,
    left: list[Tensor] | None = None,
    most: int = CANDIDATES,
) -> Tensor:
    """Draw from the likeliest tokens that top-k (of these) top-p (of these) min-p leave; ids go to `left`.

    Tokens are ranked by probability, equal ones by id. What is left is a head of that ranking, so its first few tokens
    tell it, and only rows for which they do not are ranked further.
    """
    V = p_CV.shape[1]
    K = min(most, V)
    top_CK, ids_CK = _topk(p_CV, K)
    rank_K = torch.arange(K, device=p_CV.device)
    in_k_CK = (rank_K < top_k_C1) | (top_k_C1 == 0)
    cumulative_CK = torch.where(in_k_CK, top_CK, 0.0).cumsum(-1)
    before_CK = torch.cat([cumulative_CK.new_zeros(len(p_CV), 1), cumulative_CK[:, :-1]], dim=1)
    whole_C1 = torch.where(top_k_C1 == 0, 1.0, cumulative_CK[:, -1:])
    reach_C1 = torch.where(top_p_C1 < 1.0, top_p_C1 * whole_C1, torch.inf)
    kept_CK = in_k_CK & (before_CK < reach_C1) & (top_CK >= min_p_C1 * top_CK[:, :1])
    count_C1 = kept_CK.sum(-1, keepdim=True)
    least_C1 = top_CK.gather(1, count_C1 - 1)
    next_C1 = top_CK.gather(1, count_C1.clamp(max=K - 1))
    # topk picks among equals as it likes; where only some of them are kept, they must be those of the lowest ids.
    for c in ((next_C1 == least_C1) & (count_C1 < K)).squeeze(1).nonzero().flatten().tolist():
        above, count, equal = (top_CK[c] > least_C1[c]).sum(), count_C1[c], (p_CV[c] == least_C1[c]).nonzero()
        ids_CK[c, above:count] = equal[: count - above].squeeze(1)
    ids_CK, _ = ids_CK.masked_fill(~kept_CK, V).sort(dim=-1)
    p_CK = p_CV.gather(1, ids_CK.clamp(max=V - 1)).masked_fill(ids_CK == V, 0.0)
    tokens_C = ids_CK.gather(1, _draw(p_CK, uniform_C)[:, None]).squeeze(1)
    if left is not None:
        left[:] = [ids_K[: int(count)] for ids_K, count in zip(ids_CK, count_C1, strict=True)]
    short_C1 = (count_C1 == K) | (top_k_C1 >= K)
    if K < V and bool(short_C1.any()):
        short = short_C1.squeeze(1).nonzero().squeeze(1)
        limits = (top_k_C1[short], top_p_C1[short], min_p_C1[short])
        again = None if left is None else [left[c] for c in short.tolist()]
        tokens_C[short] = _draw_from_head(p_CV[short], *limits, uniform_C[short], again, most * MORE)
        if left is not None and again is not None:
            for c, ids in zip(short.tolist(), again, strict=True):
                left[c] = ids
    return tokens_C


def _topk(p_CV: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """`p_CV.topk(K)` in half the time where V is much larger than K: the K largest numbers stand in those K columns of
    a table whose maxima are the largest, and maxima are cheap."""
    C, V = p_CV.shape
    width = V // HEIGHT
    if width < 4 * K:
        return p_CV.topk(K, dim=-1)
    table_CHW = p_CV[:, : HEIGHT * width].view(C, HEIGHT, width)
    columns_C1K = table_CHW.amax(1).topk(K, dim=-1, sorted=False).indices.unsqueeze(1)
    ids_CN = (columns_C1K + torch.arange(0, HEIGHT * width, width, device=p_CV.device)[:, None]).flatten(1)
    rest_CR = torch.arange(HEIGHT * width, V, device=p_CV.device).expand(C, -1)
    ids_CN = torch.cat([ids_CN, rest_CR], dim=1)
    top_CK, at_CK = p_CV.gather(1, ids_CN).topk(K, dim=-1)
    return top_CK, ids_CN.gather(1, at_CK)


def _logprobs(logits_BV: Tensor, p_BV: Tensor, tokens_BK: Tensor, temperature_B1: Tensor | None = None) -> Tensor:
    """Log-probability of each row's tokens, by the same arithmetic as `luciola.model.logprobs`."""
    logits_BK, most_B1 = logits_BV.gather(1, tokens_BK), logits_BV.amax(-1, keepdim=True)
    if temperature_B1 is not None:
        logits_BK, most_B1 = logits_BK / temperature_B1, most_B1 / temperature_B1
    return logits_BK - most_B1 + p_BV.amax(-1, keepdim=True).log()


def score(logits_NV: Tensor, tokens_N: Tensor, k: int) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probability of each row's token, and the row's k likeliest tokens with theirs.

    Raises:
        NotFiniteError: a row's logits are infinite or NaN.
    """
    p_NV = logits_NV.softmax(-1)
    _check(p_NV[:, 0].isfinite(), logits_NV, logits_NV)
    logps = _logprobs(logits_NV, p_NV, tokens_N[:, None]).squeeze(1).tolist()
    return logps, [
        dict(_likeliest(logits_V, p_V, k)) if k else {} for logits_V, p_V in zip(logits_NV, p_NV, strict=True)
    ]


def _likeliest(logits_V: Tensor, p_V: Tensor, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens and their log-probabilities, equal ones in order of ids."""
    (top,), (tokens,) = _topk(logits_V[None], min(k + 1, len(logits_V)))
    if len(top) > k and top[k] == top[k - 1]:  # which of the equal ones are among the k, topk does not promise
        tokens = (logits_V >= top[k]).nonzero().squeeze(1)
    else:
        tokens = tokens[:k].sort().values
    tokens = tokens[logits_V[tokens].sort(descending=True, stable=True).indices[:k]]
    return list(zip(tokens.tolist(), _logprobs(logits_V[None], p_V[None], tokens[None])[0].tolist(), strict=True))
