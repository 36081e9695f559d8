"""Weights in 8 or 4 bits: groups of numbers along a row share a float16 scale, and in 4 bits a float16 minimum.

    8 bits:  w = scale * q,              q in -127 ... 127
    4 bits:  w = scale * q + minimum,    q in 0 ... 15

Activations stay float32; a product decodes weights to float32 on the way (native/linear.c), so its only error is that
of the weights. Both forms hold llama.cpp's blocks Q8_0, Q4_0 and Q4_1 (groups of 32) without loss, and 4-bit numbers
lie as they do there: of 32 numbers the first 16 in the low halves of 16 bytes, the others in the high halves.

Shapes: M outputs, K inputs, P = K rounded up to whole groups, G = P / group, g numbers of a group; stacked experts have
one axis before these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

GROUPS = (32, 64, 128)
BLOCK = 32  # numbers that are packed together, and llama.cpp's group
GGUF_KINDS = {"Q8_0": (2, 32), "Q4_0": (2, 16), "Q4_1": (4, 16)}  # bytes of a block's scale and minimum, its numbers
HALF_MAX = 65504.0
SHRINKS = (1.0, 0.9, 0.8)  # ranges tried for 4 bits: clipping the ends can make the steps between them finer
AT_ONCE = 1 << 18  # numbers quantised at once: what is computed on the way stays in the cache


@dataclass(frozen=True, eq=False, slots=True)
class Quantized:
    """A matrix (M, K), or E of them (E, M, K), in 8 or 4 bits.

    Attributes:
        packed: (..., M, P) int8, or (..., M, P / 2) uint8 holding two numbers a byte.
        scales: (..., M, G) float16.
        minima: the same in 4 bits; None in 8.
        shape: of the matrix that it stands for.
        group: how many numbers of a row share a scale.
    """

    packed: Tensor
    scales: Tensor
    minima: Tensor | None
    shape: tuple[int, ...]
    group: int

    @property
    def bits(self) -> int:
        return 8 if self.minima is None else 4

    @property
    def dtype(self) -> torch.dtype:
        """int8 or uint8, which is also how the kernels know the form."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + (0 if self.minima is None else self.minima.nbytes)

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int, group: int = BLOCK) -> Self:
        """Room for a matrix or stack of `shape`, to be filled by `put`."""
        groups = -(-shape[-1] // group)
        kind, width = (torch.int8, groups * group) if bits == 8 else (torch.uint8, groups * group // 2)
        scales, minima = (torch.empty(*shape[:-1], groups, dtype=torch.float16) for _ in range(2))
        return cls(torch.empty(*shape[:-1], width, dtype=kind), scales, None if bits == 8 else minima, shape, group)

    def put(self, index: tuple[int | slice | Tensor, ...], piece: Quantized) -> None:
        """self[index] = piece, for an index of whole rows and a piece of the same bits and group."""
        self.packed[index] = piece.packed
        self.scales[index] = piece.scales
        if self.minima is not None and piece.minima is not None:
            self.minima[index] = piece.minima

    def rows(self, start: int, stop: int) -> Quantized:
        """Outputs `start` to `stop`, sharing memory."""
        minima = None if self.minima is None else self.minima[..., start:stop, :]
        packed, scales = self.packed[..., start:stop, :], self.scales[..., start:stop, :]
        return Quantized(packed, scales, minima, (*self.shape[:-2], packed.shape[-2], self.shape[-1]), self.group)

    @classmethod
    def joined(cls, parts: Sequence[Quantized]) -> Quantized | None:
        """Matrices of the same inputs below each other, in new memory; None where they are in different forms."""
        first = parts[0]
        if any((p.dtype, p.group, p.shape[-1]) != (first.dtype, first.group, first.shape[-1]) for p in parts):
            return None
        minima = None if first.minima is None else torch.cat([p.minima for p in parts if p.minima is not None])
        packed, scales = torch.cat([p.packed for p in parts]), torch.cat([p.scales for p in parts])
        return cls(packed, scales, minima, (len(packed), first.shape[-1]), first.group)

    def expert(self, e: int) -> Quantized:
        """Matrix `e` of a stack, sharing memory."""
        minima = None if self.minima is None else self.minima[e]
        return Quantized(self.packed[e], self.scales[e], minima, self.shape[1:], self.group)

    def dequantize(self) -> Tensor:
        """The matrix in float32, of `shape`."""
        if self.minima is None:
            numbers = self.packed
        else:
            blocks = self.packed.unflatten(-1, (-1, BLOCK // 2))
            numbers = torch.cat((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
        w_MGg = numbers.unflatten(-1, (-1, self.group)) * self.scales.float().unsqueeze(-1)
        if self.minima is not None:
            w_MGg += self.minima.float().unsqueeze(-1)
        return w_MGg.flatten(-2)[..., : self.shape[-1]]  # type: ignore[no-any-return]

    @classmethod
    def from_gguf(cls, kind: str, raw: Tensor, shape: tuple[int, ...]) -> Self:
        """A tensor of a GGUF file as it is: nothing is rounded again.

        Args:
            kind: "Q8_0", "Q4_0" or "Q4_1".
            raw: its bytes, uint8.
            shape: outermost axis first; rows are whole blocks of 32.

        Raises:
            ValueError: another kind, or a number of bytes that does not fit the shape.
        """
        if kind not in GGUF_KINDS:
            raise ValueError(
                f"kind {kind!r} has another layout than those that stay quantised: {', '.join(GGUF_KINDS)}"
            )
        head, body = GGUF_KINDS[kind]
        G = shape[-1] // BLOCK
        if shape[-1] % BLOCK or raw.numel() != (head + body) * G * torch.Size(shape[:-1]).numel():
            raise ValueError(f"raw has {raw.numel():,} bytes, which is not a tensor of shape {list(shape)} in {kind}")
        blocks = raw.view(*shape[:-1], G, head + body)
        packed = blocks[..., head:].flatten(-2).contiguous()
        halves = blocks[..., :head].contiguous().view(torch.float16)
        scales = halves[..., 0].contiguous()
        if kind == "Q8_0":
            return cls(packed.view(torch.int8), scales, None, shape, BLOCK)
        # Q4_0 counts from -8, and eight times a float16 is one too, unless it is larger than any weight's scale.
        minima = (-8 * scales.float()).half() if kind == "Q4_0" else halves[..., 1].contiguous()
        return cls(packed, scales, minima, shape, BLOCK)


def quantize(weight: Tensor, bits: int, group: int = BLOCK) -> Quantized:
    """The matrix (M, K), or a stack (E, M, K), in `bits`, with the least squared error found.

    Any K will do: the last group of a row is filled up with its last number, which no product then meets.

    Raises:
        ValueError: bits or group is not one there is, weight is no matrix, or it has values that float16 scales cannot
            reach (NaN, infinite, or huge).
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 4 or 8")
    if group not in GROUPS:
        raise ValueError(f"group={group} must be one of {', '.join(map(str, GROUPS))}")
    if weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be a matrix or a stack of them, not of shape {list(weight.shape)}")
    if not bool(weight.abs().max() <= HALF_MAX):  # false for NaN too
        raise ValueError(f"weight has values beyond {HALF_MAX:g} or none at all (NaN); such a matrix must stay float")
    *leading, K = weight.shape
    G = -(-K // group)
    rows = weight.detach().reshape(-1, K)
    parts = []
    for some_MK in rows.split(max(1, AT_ONCE // K)):
        w_MP = torch.cat((some_MK.float(), some_MK[:, -1:].float().expand(-1, G * group - K)), dim=1)
        parts.append((_in_8_bits if bits == 8 else _in_4_bits)(w_MP.view(-1, G, group)))
    packed, scales, minima = (torch.cat(part).view(*leading, -1) for part in zip(*parts, strict=True))
    return Quantized(packed, scales, minima if bits == 4 else None, tuple(weight.shape), group)


def _in_8_bits(w_MGg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale_MG1 = (w_MGg.abs().amax(-1, keepdim=True) / 127).half().float()
    q_MGg = (w_MGg * _inverse(scale_MG1)).round_().clamp_(-127, 127)
    return q_MGg.to(torch.int8).flatten(1), scale_MG1.squeeze(-1).half(), w_MGg.new_empty(len(w_MGg), 0)


def _in_4_bits(w_MGg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From each of several ranges: the numbers nearest to the weights, then scale and minimum by least squares for
    these numbers, then the numbers again. The best of all ranges is kept, group by group."""
    low_MG1, high_MG1 = (edge.unsqueeze(-1) for edge in w_MGg.aminmax(dim=-1))
    middle_MG1, mean_MG1 = (low_MG1 + high_MG1) / 2, w_MGg.mean(-1, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for shrink in SHRINKS:
        scale_MG1 = shrink * (high_MG1 - low_MG1) / 15
        minimum_MG1 = middle_MG1 - 7.5 * scale_MG1
        q_MGg = _numbers(w_MGg, scale_MG1, minimum_MG1)
        q_mean_MG1 = q_MGg.mean(-1, keepdim=True)
        deviation_MGg = q_MGg - q_mean_MG1
        variance_MG1 = deviation_MGg.square().sum(-1, keepdim=True)
        covariance_MG1 = deviation_MGg.mul_(w_MGg).sum(-1, keepdim=True)
        scale_MG1 = (covariance_MG1 * _inverse(variance_MG1)).half().float()
        minimum_MG1 = (mean_MG1 - scale_MG1 * q_mean_MG1).half().float()
        q_MGg = _numbers(w_MGg, scale_MG1, minimum_MG1)
        error_MG1 = (q_MGg * scale_MG1).add_(minimum_MG1).sub_(w_MGg).square_().sum(-1, keepdim=True)
        found = (error_MG1, q_MGg, scale_MG1, minimum_MG1)
        if best is None:
            best = found
        else:
            better_MG1 = error_MG1 < best[0]
            best = tuple(torch.where(better_MG1, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, q_MGg, scale_MG1, minimum_MG1 = best
    q_Mbn = q_MGg.to(torch.uint8).view(len(w_MGg), -1, BLOCK)
    packed_Mbn = q_Mbn[..., : BLOCK // 2] | q_Mbn[..., BLOCK // 2 :] << 4
    return packed_Mbn.flatten(1), scale_MG1.squeeze(-1).half(), minimum_MG1.squeeze(-1).half()


def _numbers(w_MGg: Tensor, scale_MG1: Tensor, minimum_MG1: Tensor) -> Tensor:
    return (w_MGg - minimum_MG1).mul_(_inverse(scale_MG1)).round_().clamp_(0, 15)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is."""
    return torch.where(x == 0, 0.0, 1 / x)
