"""Writing one safetensors file: the header, then each tensor as it comes, so that only one is in memory at a time.

The safetensors package writes files too, but wants all tensors of a file at once, and orders the metadata differently
from one run to the next, while here the same weights are the same file, byte for byte. Reading is the package's.

Layout: the header's length (8 bytes, little-endian), the header as JSON padded with blanks, the tensors without gaps.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHECKSUMS = "luciola.crc32"  # in a file's metadata; other programs pass over it

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def write(path: Path, layout: Layout, tensor: Callable[[str], Tensor]) -> None:
    """Write tensors of the shapes and dtypes in `layout` to a new file; `tensor` gives each when its turn comes."""
    names = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))  # so that every number is aligned
    sums = dict.fromkeys(names, 0)
    header = _header(layout, names, sums)
    with path.open("wb") as file:
        file.write(header)
        for name in names:
            values = tensor(name).detach().cpu().contiguous()
            shape, dtype = layout[name]
            assert (tuple(values.shape), values.dtype) == (tuple(shape), dtype)
            sums[name] = checksum(values)
            file.write(_bytes(values))
        file.seek(0)
        file.write(_header(layout, names, sums))


def _header(layout: Layout, names: list[str], sums: Mapping[str, int]) -> bytes:
    """The same number of bytes whatever the checksums are."""
    checksums = json.dumps({name: f"{sums[name]:08x}" for name in names})
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: checksums}}
    end = 0
    for name in names:
        shape, dtype = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's dtype, shape and bytes."""
    return zlib.crc32(_bytes(tensor), zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
