"""Rotary position embedding (Su et al., 2021) and its stretched forms: YaRN, linear, Llama 3.

Position p turns feature pair k by the angle p * f_k, f_k = theta^(-2k/d). Which features form a pair is a convention
of the weights: DeepSeek publishes MLA weights with neighbours (2k, 2k+1) paired ("interleaved"), Llama pairs (k, k +
d/2) ("half-split"). `turn` is the only place that knows.

Shapes: B batch, T time, d rotary features a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from luciola.model.config import ModelConfig, RopeScaling, yarn_temperature
from luciola.model.native import pointwise
from luciola.model.native.repeat import usable


class Rotation(NamedTuple):
    """Cosine and sine of every angle: (T, d/2), or (B, T, d/2) where rows stand at different positions; float32."""

    cos: Tensor
    sin: Tensor


def turn(x: Tensor, rotation: Rotation, interleaved: bool, *, back: bool = False) -> Tensor:
    """Turn x_B..Td by `rotation`, or `back` by the opposite angles (the inverse, and what gradients go through); axes
    between B and T (heads) share the angles. Returns x's shape, order and dtype, contiguous. Not recorded by
    autograd."""
    if not interleaved and x.ndim == 4 and usable(x):
        return pointwise.turn(x, *rotation, back=back)
    cos, sin = rotation.cos, -rotation.sin if back else rotation.sin
    if cos.ndim == 3:
        for _ in range(x.ndim - 3):
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:  # neighbours are the two parts of a complex number: one product
        pairs = x.float().unflatten(-1, (-1, 2))
        if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.empty(pairs.shape[:-1], dtype=torch.complex64, device=x.device)
        torch.mul(torch.view_as_complex(pairs), torch.complex(cos, sin), out=turned)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return out


class _RotateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
        ctx.rotation, ctx.interleaved = Rotation(cos, sin), interleaved
        return turn(x, ctx.rotation, interleaved)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return turn(g, ctx.rotation, ctx.interleaved, back=True), None, None, None


def rotate(x: Tensor, rotation: Rotation, interleaved: bool) -> Tensor:
    """`turn`, differentiable in x."""
    return _RotateFunction.apply(x, *rotation, interleaved)  # type: ignore[no-any-return]


def frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """The d/2 angular frequencies (float32) and the factor on cosine and sine."""
    d, theta, scaling = config.rope_dim, config.rope_theta, config.rope_scaling
    f = theta ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
    if scaling is None:
        return f, 1.0
    if scaling.rope_type == "linear":
        return f / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(f, scaling), 1.0
    return _yarn(f, scaling, config)


def _yarn(f: Tensor, s: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023, section 3.2): fast frequencies stay, slow ones are divided by the factor, a ramp
    between.

    The ramp's ends are the dimensions that turn `beta_fast` and `beta_slow` times within the original length.
    """
    d, theta = config.rope_dim, config.rope_theta
    length = s.original_max_position_embeddings or config.max_position_embeddings

    def dimension(turns: float) -> float:
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    f = f * (1 - ramp) + f / s.factor * ramp
    if s.attention_factor is not None:
        return f, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return f, yarn_temperature(s.factor, s.mscale) / yarn_temperature(s.factor, s.mscale_all_dim)
    return f, yarn_temperature(s.factor, 1.0)


def _llama3(f: Tensor, s: RopeScaling) -> Tensor:
    """Llama 3.1: wavelengths beyond L/low are divided by the factor, those below L/high stay, a linear blend
    between."""
    length = s.original_max_position_embeddings
    assert length is not None  # ModelConfig has checked it
    turns = length * f / (2 * math.pi)
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return f * blend + f / s.factor * (1 - blend)


class Rope:
    """The table of cosines and sines, grown on demand. Not a module: nothing here is trained, saved, or cast to less
    than float32 together with the weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._table: Rotation | None = None

    def table(self, length: int, device: torch.device) -> Rotation:
        """Rotation of positions 0 to at least length - 1; the same tensors as before while they reach."""
        if self._table is None or len(self._table.cos) < length or self._table.cos.device != device:
            length = max(256, 1 << (length - 1).bit_length())
            with (
                torch.inference_mode(False),
                torch.device("cpu"),
            ):  # a table made while generating must serve training too
                f, factor = frequencies(self.config)
                angles = torch.arange(length, dtype=torch.float32)[:, None] * f
                self._table = Rotation((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))
        return self._table

    def __call__(self, length: int, device: torch.device, positions_BT: Tensor | None = None) -> Rotation:
        """Rotation of positions 0..length-1, or of `positions_BT` (all below `length`) where it is given."""
        cos, sin = self.table(length, device)
        if positions_BT is None:
            return Rotation(cos[:length], sin[:length])
        return Rotation(cos[positions_BT], sin[positions_BT])
