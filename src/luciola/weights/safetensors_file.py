"""One safetensors file, read and written one tensor at a time.

Reading is the safetensors package's; added here are the checksums of the files this project writes, and giving mapped
memory back. The package writes files too, but wants all tensors of a file at once, and orders the metadata differently
from one run to the next, while here the same weights are the same file, byte for byte.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luciola.text.untrusted import is_name, printable, shortened

KIND_OF = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHECKSUMS = "luciola.crc32"  # in a file's metadata; other programs pass over it

MOST_TENSORS = 250_000  # DeepSeek-V3, all shards together, has 91,991
RELEASE_BYTES = 32 << 20

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def write(path: Path, layout: Layout, tensor: Callable[[str], Tensor]) -> None:
    """Write tensors of the shapes and dtypes in `layout` to a new file; `tensor` gives each when its turn comes."""
    names = sorted(layout, key=lambda name: -layout[name][1].itemsize)  # so that every number is aligned
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
        entries[name] = {"dtype": KIND_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor's dtype, shape and bytes."""
    return zlib.crc32(_bytes(tensor), zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


class Reader:
    """A file opened for reading: names, shapes and kinds from its header, tensors when asked for.

    Raises:
        ValueError: the file is damaged, cut short or may not be read, or holds a name no tensor has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        self._touched = 0
        self.names: frozenset[str] = frozenset(self._file.keys())
        if len(self.names) > MOST_TENSORS:
            raise ValueError(f"{path} announces {len(self.names):,} tensors, more than any model has; fetch it again.")
        odd = next((name for name in self.names if not is_name(name)), None)
        if odd is not None:
            raise ValueError(f"{path} is damaged: no tensor of a model is called {shortened(odd)}; fetch it again.")
        self._checksums = self._stated_checksums()

    def _stated_checksums(self) -> dict[str, str]:
        """Those that this project writes; other files have none."""
        text = (self._file.metadata() or {}).get(CHECKSUMS)
        if text is None:
            return {}
        try:
            checksums = json.loads(text)
            if self.names == checksums.keys() and all(isinstance(known, str) for known in checksums.values()):
                return dict(checksums)
        except (ValueError, AttributeError, RecursionError):
            pass
        raise ValueError(f"{self.path} is damaged: its checksums are not readable; fetch it again.")

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape, and the format's name for its kind of number."""
        found = self._file.get_slice(name)
        return tuple(found.get_shape()), found.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from the file.

        Raises:
            ValueError: it is not what was written.
        """
        found: Tensor = self._file.get_tensor(name)
        known = self._checksums.get(name)
        if known is not None and known != f"{checksum(found):08x}":
            raise ValueError(f"{self.path} is damaged: tensor {name} is not as it was written; fetch it again.")
        self._touched += found.nbytes
        if self._touched > RELEASE_BYTES:
            self.release()
        return found

    def release(self) -> None:
        """Map the file anew: pages of a mapping count as this process's memory for as long as it is open."""
        if self._touched:
            self._file, self._touched = _opened(self.path), 0


def _opened(path: Path) -> Any:
    try:
        path.open("rb").close()  # safetensors itself calls a file that may not be read a missing one
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {printable(error.strerror or str(error))}.") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({printable(str(error))}); fetch it again."
        ) from error
