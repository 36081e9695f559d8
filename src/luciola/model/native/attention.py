"""Attention of new tokens over a paged cache: multi-head latent attention, absorbed, and grouped-query attention.

A step brings N new tokens of any number of sequences, several of one sequence too. All write their cache entries, then
each attends to its sequence up to itself. Whether the kernel runs or the formula beside it, a token's result depends on
its own sequence only; the kernel's to the last bit, whatever else is in the step, wherever the blocks lie and however
many threads there are.

Shapes: N new tokens, R sequences, M blocks of a table, P slots of the pool (slot = block * block_size + offset), S
positions looked at, H query heads, G key-value heads, C numbers of a slot or of a latent, X of a fused projection; n,
r, v: widths of a head's part without position, of its rotary part, of its value; d width of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luciola.model.native.repeat import Repeated, kernel
from luciola.model.norm import RMSNorm
from luciola.model.rope import Rotation, turn

CACHED = (torch.float32, torch.bfloat16)  # what the kernels read


class _Paged(ctypes.Structure):
    """A step as the kernels take it; its fields are those of `Step` in attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "positions", "table", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("tokens", "R", "M", "block", "angles")),
    )


class _MLA(ctypes.Structure):
    """What `luciola_mla_attend` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "q", "ckv", "norm", "kv_b", "pool", "step")),
        *((name, ctypes.c_int64) for name in ("q_stride", "ckv_stride", "slots")),
        *((name, ctypes.c_int64) for name in ("heads", "rank", "nope", "rope", "v")),
        *((name, ctypes.c_int32) for name in ("kv_b_half", "half", "interleaved")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class _GQA(ctypes.Structure):
    """What `luciola_gqa_attend` takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "qkv", "q_norm", "k_norm", "pool", "step")),
        *((name, ctypes.c_int64) for name in ("qkv_stride", "slots", "heads", "kv_heads", "width", "window")),
        ("half", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("q_eps", "k_eps", "scale")),
    )


@dataclass(frozen=True)
class Step:
    """What all layers share in one decoding step: token n is at `positions_N[n]` of sequence `rows_N[n]`, whose blocks
    are that row of the table (all int32, N and R at least 1); the angles of every position, (positions, d/2) float32.
    Made once a step, or written anew for the next one: the kernels read these tensors where they lie. With a dictionary
    as `again` the next step of one model over one cache costs less. `tokens_N` (int64) are the tokens themselves, where
    the step begins with their embeddings. Raises ValueError for other types or shapes."""

    rows_N: Tensor
    positions_N: Tensor
    table_RM: Tensor
    block_size: int
    cos: Tensor
    sin: Tensor
    again: dict[str, Repeated[Any]] | None = field(default=None, repr=False, compare=False)
    tokens_N: Tensor | None = None
    tokens: int = field(init=False, repr=False)
    turned: int = field(init=False, repr=False)
    native: int = field(init=False, repr=False)
    _paged: _Paged = field(init=False, repr=False)

    def run(self, name: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """`function(*inputs)`; where `again` is a dictionary, by repeating the native calls that the function of this
        name made the first time (see `Repeated`)."""
        if self.again is None:
            return function(*inputs)
        if name not in self.again:
            self.again[name] = Repeated(function)
        return self.again[name](*inputs)

    def __post_init__(self) -> None:
        for name, axes, dtype in [
            ("rows_N", 1, torch.int32), ("positions_N", 1, torch.int32), ("table_RM", 2, torch.int32),
            ("cos", 2, torch.float32), ("sin", 2, torch.float32), ("tokens_N", 1, torch.int64),
        ]:  # fmt: skip
            x = getattr(self, name)
            if x is None and name == "tokens_N":
                continue
            if x.dtype is not dtype or x.ndim != axes or not x.is_contiguous() or not x.numel():
                raise ValueError(
                    f"step.{name}: {x.dtype} of shape {tuple(x.shape)}; it must be {dtype} with {axes} axes, not "
                    f"empty and without gaps (.to({dtype}).contiguous())"
                )
        known_tokens = self.rows_N if self.tokens_N is None else self.tokens_N
        if not len(self.rows_N) == len(self.positions_N) == len(known_tokens) or self.cos.shape != self.sin.shape:
            raise ValueError(
                "step: rows_N, positions_N and tokens_N, cos and sin must have the same shape; one of each a token"
            )
        tensors = (self.rows_N, self.positions_N, self.table_RM, self.cos, self.sin)
        sizes = (len(self.rows_N), *self.table_RM.shape, self.block_size, len(self.cos))
        paged = _Paged(*(x.data_ptr() for x in tensors), *sizes)
        known = {"tokens": len(self.rows_N), "turned": 2 * self.cos.shape[1], "_paged": paged}
        for name, value in (known | {"native": ctypes.addressof(paged)}).items():
            object.__setattr__(self, name, value)


def mla_attend(
    q_NHx: Tensor,
    ckv_NC: Tensor,
    latent_norm: RMSNorm,
    kv_b_weight: Tensor,
    pool_PC: Tensor,
    step: Step,
    *,
    scale: float,
    interleaved: bool,
    nope: int,
    rope: int,
    v: int,
) -> Tensor:
    """Multi-head latent attention of the new tokens, before the output projection; their [c ; k_R] go into the pool.

    `q_NHx`: (N, H, n + r) and `ckv_NC`: (N, rank + r), neither rotated nor normalised; `kv_b_weight`: (H (n + v),
    rank), float32 or bfloat16; `pool_PC`: (P, rank + r), float32 or bfloat16. Returns (N, H v) float32. Raises
    ValueError where shapes do not fit or a table leads outside the pool. Source: `MLA.decode`.
    """
    native, kind, weight_kind = kernel("luciola_mla_attend"), pool_PC.dtype, kv_b_weight.dtype
    (q_apart, head_apart, q_dense), (ckv_apart, ckv_dense) = q_NHx.stride(), ckv_NC.stride()
    if (
        native is None
        or not (kind in CACHED and weight_kind in CACHED and q_NHx.dtype is ckv_NC.dtype is torch.float32)
        or not (q_dense == ckv_dense == 1 and head_apart == nope + rope and pool_PC.is_cpu)
        or not (pool_PC.is_contiguous() and kv_b_weight.is_contiguous())
    ):
        return mla_formula(
            q_NHx, ckv_NC, latent_norm, kv_b_weight, pool_PC, step,
            scale=scale, interleaved=interleaved, nope=nope, rope=rope, v=v,
        )  # fmt: skip
    norm, (slots, width), (tokens, heads, _) = float_weight(latent_norm), pool_PC.shape, q_NHx.shape
    rank = width - rope
    if (
        not tokens == step.tokens == ckv_NC.shape[0]
        or step.turned != rope
        or kv_b_weight.shape != (heads * (nope + v), rank)
        or ckv_NC.shape[1] != width
    ):
        raise ValueError(
            f"mla_attend: {step.tokens} tokens turned by {step.turned} numbers in the step, but q_NHx "
            f"{tuple(q_NHx.shape)}, ckv_NC {tuple(ckv_NC.shape)}, kv_b_weight {tuple(kv_b_weight.shape)} and pool_PC "
            f"{tuple(pool_PC.shape)}, for nope={nope}, rope={rope}, v={v}; pass tensors of one layer and step"
        )
    o_NX = torch.empty(tokens, heads * v)
    failure = native(_MLA(
        o_NX.data_ptr(), q_NHx.data_ptr(), ckv_NC.data_ptr(), norm.data_ptr(), kv_b_weight.data_ptr(),
        pool_PC.data_ptr(), step.native, q_apart, ckv_apart, slots, heads, rank, nope, rope, v,
        weight_kind is torch.bfloat16, kind is torch.bfloat16, interleaved, latent_norm.eps, scale,
    ), norm, kv_b_weight, pool_PC, step)  # fmt: skip
    if failure:
        raise _error(failure, step)
    return o_NX


def gqa_attend(
    qkv_NX: Tensor,
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
    pool_PC: Tensor,
    step: Step,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Grouped-query attention of the new tokens, before the output projection; their keys and values go into the pool.

    `qkv_NX`: (N, (H + 2 G) d), queries, keys, values, neither normalised nor rotated; `pool_PC`: (P, 2 G d), float32 or
    bfloat16, keys before values; with `window` a token sees itself and the window - 1 before it. Returns (N, H d)
    float32. Raises ValueError where shapes do not fit or a table leads outside the pool. Source: `GQA.decode`.
    """
    native, kind, (apart, dense) = kernel("luciola_gqa_attend"), pool_PC.dtype, qkv_NX.stride()
    if (
        native is None
        or not (kind in CACHED and qkv_NX.dtype is torch.float32)
        or not (dense == 1 and pool_PC.is_cpu and pool_PC.is_contiguous())
    ):
        return gqa_formula(
            qkv_NX, q_norm, k_norm, pool_PC, step,
            heads=heads, kv_heads=kv_heads, width=width, scale=scale, window=window,
        )  # fmt: skip
    of_q = None if q_norm is None else float_weight(q_norm)
    of_k = None if k_norm is None else float_weight(k_norm)
    (tokens, numbers), (slots, kept) = qkv_NX.shape, pool_PC.shape
    if (
        tokens != step.tokens
        or step.turned != width
        or numbers != (heads + 2 * kv_heads) * width
        or kept != 2 * kv_heads * width
    ):
        raise ValueError(
            f"gqa_attend: {step.tokens} tokens turned by {step.turned} numbers in the step, but qkv_NX "
            f"{tuple(qkv_NX.shape)} and pool_PC {tuple(pool_PC.shape)}, for heads={heads}, kv_heads={kv_heads}, "
            f"width={width}; pass tensors of one layer and step"
        )
    o_NX = torch.empty(tokens, heads * width)
    failure = native(_GQA(
        o_NX.data_ptr(), qkv_NX.data_ptr(), None if of_q is None else of_q.data_ptr(),
        None if of_k is None else of_k.data_ptr(), pool_PC.data_ptr(), step.native, apart, slots, heads, kv_heads,
        width, window or 0, kind is torch.bfloat16, 0.0 if q_norm is None else q_norm.eps,
        0.0 if k_norm is None else k_norm.eps, scale,
    ), of_q, of_k, pool_PC, step)  # fmt: skip
    if failure:
        raise _error(failure, step)
    return o_NX


@torch.no_grad()
def mla_formula(
    q_NHx: Tensor,
    ckv_NC: Tensor,
    latent_norm: RMSNorm,
    kv_b_weight: Tensor,
    pool_PC: Tensor,
    step: Step,
    *,
    scale: float,
    interleaved: bool,
    nope: int,
    rope: int,
    v: int,
) -> Tensor:
    """`mla_attend` in PyTorch, in float32."""
    heads, rank = q_NHx.shape[1], pool_PC.shape[1] - rope
    qC_NHn, qR_NHr = q_NHx.float().split((nope, rope), dim=-1)
    c_NC, kR_Nr = ckv_NC.float().split((rank, rope), dim=-1)
    angles, weight = _angles(step), latent_norm.weight.float()
    c_NC = torch.nn.functional.rms_norm(c_NC, (rank,), weight, latent_norm.eps)
    kR_N1r, qR_NH1r = turn(kR_Nr.unsqueeze(1), angles, interleaved), turn(qR_NHr.unsqueeze(2), angles, interleaved)
    slots_NS, seen_NS = _slots(step)
    pool_PC[_own(step)] = torch.cat((c_NC, kR_N1r[:, 0]), dim=-1).to(pool_PC.dtype)
    W_UK_HnC, W_UV_HvC = kv_b_weight.float().unflatten(0, (heads, nope + v)).split((nope, v), dim=1)
    qC_NHC = torch.einsum("Nhn,hnc->Nhc", qC_NHn, W_UK_HnC)
    entries_NSC = pool_PC[slots_NS].float()
    s_NHS = torch.einsum("Nhc,Nsc->Nhs", torch.cat((qC_NHC, qR_NH1r[:, :, 0]), dim=-1), entries_NSC) * scale
    p_NHS = s_NHS.masked_fill(~seen_NS.unsqueeze(1), -torch.inf).softmax(-1)
    o_NHC = torch.einsum("Nhs,Nsc->Nhc", p_NHS, entries_NSC[..., :rank])
    return torch.einsum("Nhc,hvc->Nhv", o_NHC, W_UV_HvC).flatten(1)


@torch.no_grad()
def gqa_formula(
    qkv_NX: Tensor,
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
    pool_PC: Tensor,
    step: Step,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`gqa_attend` in PyTorch, in float32."""
    q_NHd, k_NGd, v_NGd = qkv_NX.float().unflatten(-1, (-1, width)).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q_NHd = torch.nn.functional.rms_norm(q_NHd, (width,), q_norm.weight.float(), q_norm.eps)
    if k_norm is not None:
        k_NGd = torch.nn.functional.rms_norm(k_NGd, (width,), k_norm.weight.float(), k_norm.eps)
    q_NHd, k_NGd = (turn(x.unsqueeze(2), _angles(step), False).squeeze(2) for x in (q_NHd, k_NGd))
    slots_NS, seen_NS = _slots(step, window)
    pool_PC[_own(step)] = torch.cat((k_NGd, v_NGd), dim=1).flatten(1).to(pool_PC.dtype)
    keys_NSGd, values_NSGd = pool_PC[slots_NS].float().unflatten(-1, (2, kv_heads, width)).unbind(2)
    q_NGRd = q_NHd.unflatten(1, (kv_heads, -1))
    s_NGRS = torch.einsum("Ngrd,Nsgd->Ngrs", q_NGRd, keys_NSGd) * scale
    p_NGRS = s_NGRS.masked_fill(~seen_NS[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("Ngrs,Nsgd->Ngrd", p_NGRS, values_NSGd).flatten(1)


def _angles(step: Step) -> Rotation:
    positions_N1 = step.positions_N.long().unsqueeze(1)
    return Rotation(step.cos[positions_N1], step.sin[positions_N1])


def _own(step: Step) -> Tensor:
    """The slot of each new token, (N,)."""
    positions_N = step.positions_N.long()
    blocks_N = step.table_RM[step.rows_N.long(), positions_N // step.block_size].long()
    return blocks_N * step.block_size + positions_N % step.block_size


def _slots(step: Step, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The slots of the positions that any token looks at, (N, S), and which of them each token sees. Where one sees
    nothing stands its own slot, for what a table holds beyond its sequence leads anywhere."""
    positions_N1 = step.positions_N.long().unsqueeze(1)
    at_S = torch.arange(int(positions_N1.max()) + 1, device=positions_N1.device)
    seen_NS = at_S <= positions_N1
    if window is not None:
        seen_NS &= at_S > positions_N1 - window
    blocks_NS = step.table_RM[step.rows_N.long()][:, at_S // step.block_size].long()
    slots_NS = blocks_NS * step.block_size + at_S % step.block_size
    return torch.where(seen_NS, slots_NS, _own(step).unsqueeze(1)), seen_NS


def float_weight(norm: RMSNorm) -> Tensor:
    """A norm's weight, float32. Looked up where Module.__getattr__ looks in the end: a microsecond sooner."""
    weight = norm._parameters["weight"]
    assert weight is not None
    return weight if weight.dtype is torch.float32 else weight.float()


def _error(failure: int, step: Step) -> Exception:
    if failure == 1:
        return MemoryError("no memory for the attention kernel's scratch space; use a shorter context or fewer tokens")
    return ValueError(
        f"step: a token's row, position or block lies outside the table {tuple(step.table_RM.shape)}, the "
        f"{len(step.cos)} rotation angles or the pool; give each sequence the blocks that its positions need"
    )
