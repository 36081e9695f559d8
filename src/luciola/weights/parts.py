"""The part of a parameter that one tensor in a file holds, where file and memory cut a parameter differently.

Everything is indexing: the tensor in the file is `parameter[index]`, and `parameter[index] = tensor` brings it back.
The two conventions of rotary embedding (`model/rope.py`) meet here and nowhere else: files which pair neighbouring
features hold the rows of a projection in another order than memory where memory pairs the halves of a head.

Shapes: E experts, I inner width, D hidden, H heads, C latent, n and v widths of a head's key and value, r of its rotary
part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from luciola.model.config import ModelConfig

Index = tuple[int | slice | Tensor, ...]
Shape = tuple[int, ...]


def _whole() -> Index:
    return ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a file belongs: `parameter[index()]`, which has `shape`."""

    name: str
    shape: Shape
    index: Callable[[], Index] = _whole


def places_of(part: str, name: str, shape: Shape, config: ModelConfig) -> list[tuple[dict[str, int], Place]]:
    """The places that `part` of a table entry stands for in the parameter `name` of `shape`, and the {e} of each."""
    if part == "":
        return [({}, Place(name, shape))]
    if part == "paired":
        return [({}, Place(name, shape, partial(_neighbours, name, config)))]
    if part in ("keys", "values"):
        return [({}, _of_kv_b(part, name, config))]
    experts, inner = shape[0], shape[1] // 2
    rows = {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}
    if part in rows:
        whole = slice(None)
        return [({}, Place(name, (experts, inner, shape[2]), lambda: (whole, rows[part])))]
    of_one = rows.get(part.removesuffix(" of {e}"))
    one_shape = shape[1:] if of_one is None else (inner, shape[2])
    return [({"e": e}, Place(name, one_shape, partial(_of_expert, e, of_one))) for e in range(experts)]


def _of_expert(e: int, rows: slice | None) -> Index:
    return (e,) if rows is None else (e, rows)


def _of_kv_b(part: str, name: str, config: ModelConfig) -> Place:
    """Of W_UKV (H (n + v), C): the keys' rows as (H, C, n), which absorb into queries, or the values' as (H, v, C)."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank or 0
    n, v = config.qk_nope_head_dim or 0, config.v_head_dim or 0

    def rows_HCn() -> Index:
        start_H11 = (torch.arange(heads) * (n + v)).view(heads, 1, 1)
        return start_H11 + torch.arange(n), torch.arange(rank).view(1, rank, 1)

    def rows_Hv() -> Index:
        return ((torch.arange(heads) * (n + v))[:, None] + n + torch.arange(v),)

    if part == "keys":
        return Place(name, (heads, rank, n), rows_HCn)
    return Place(name, (heads, v, rank), rows_Hv)


def rotary_rows(name: str, config: ModelConfig) -> tuple[int, int, int]:
    """How the rows of a projection that is rotated afterwards lie: heads, features of each at rest, features turned."""
    rest, turned = (config.qk_nope_head_dim or 0) if config.is_mla else 0, config.rope_dim
    if "kv_a_proj_with_mqa" in name:
        return 1, config.kv_lora_rank or 0, turned
    heads = config.num_key_value_heads if "k_proj" in name else config.num_attention_heads
    return heads or config.num_attention_heads, rest, turned


def _neighbours(name: str, config: ModelConfig) -> Index:
    """Rows of a projection in the order in which features that turn together are neighbours."""
    if config.is_mla and config.rope_interleave:
        return ()  # so they are in memory
    heads, rest, turned = rotary_rows(name, config)
    half = torch.arange(turned // 2)
    turning = torch.stack((half, half + turned // 2), dim=1).flatten() + rest
    within = torch.cat((torch.arange(rest), turning))
    return ((torch.arange(heads)[:, None] * (rest + turned) + within).flatten(),)


def take(parameter: Tensor, place: Place) -> Tensor:
    """The tensor of the file from the parameter in memory, contiguous."""
    return parameter[place.index()].contiguous()


def put(parameter: Tensor, place: Place, tensor: Tensor) -> None:
    """Write the tensor of the file into the parameter in memory, converting its dtype."""
    index = place.index()
    if any(isinstance(part, Tensor) for part in index):
        parameter[index] = tensor.to(parameter.dtype).to(parameter.device)
    else:
        parameter[index].copy_(tensor)
