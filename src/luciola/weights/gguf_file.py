"""The GGUF container: metadata, and the position of each quantised tensor.

The `gguf` package has a reader too. This one exists because that one takes three seconds for the 98,000 strings of a
49,152-token vocabulary (this one: a tenth of a second), and because a damaged array length sends it into an endless
loop; here every count is held against the bytes that are left. Dequantising is the package's.

Layout (ggml/docs/gguf.md), little-endian: "GGUF", version, tensor count, metadata count; metadata as key, type, value;
tensors as name, dimensions (innermost first), type, offset; padding to the alignment; tensor data.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from luciola.text.untrusted import is_name, shortened

_STRING, _ARRAY = 8, 9
_ALIGNMENTS = {1 << power for power in range(17)}
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}

_PLAIN = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.F64: "<f8"}


class DamagedError(ValueError):
    """The bytes are not those of a whole GGUF file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's shape (outermost axis first), how it is quantised, and where its bytes are."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """A GGUF file opened for reading; tensor data is mapped, not read, until asked for.

    Raises:
        ValueError: the file is damaged, cut short, or of a version before 2 (2023).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ValueError(f"{path} is empty.") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._last: TensorInfo | None = None
        try:
            self._read()
        except (DamagedError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again.") from error

    def _read(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise DamagedError("it does not begin with GGUF; of a model in Hugging Face layout give the folder")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise DamagedError(f"its version is {version}; 2 and 3 are known")
        tensor_count, metadata_count = self._number("Q"), self._number("Q")
        for _ in range(metadata_count):
            key = self._name()
            if key in self.metadata:
                raise DamagedError(f"the key {key} appears twice")
            self.metadata[key] = self._value(self._number("I"))
        infos = [self._tensor_header() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise DamagedError("its alignment is no power of two up to 65,536")

        def aligned(position: int) -> int:
            return -(-position // alignment) * alignment

        data_start = end = aligned(self._at)
        for name, shape, kind, offset in infos:
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            if name in self.tensors or shape[-1] % per_block:
                raise DamagedError(f"tensor {name} appears twice, or its rows are not whole blocks of {kind.name}")
            if data_start + offset != aligned(end):
                raise DamagedError(f"tensor {name} does not begin where the one before it ends")
            start, end = aligned(end), aligned(end) + math.prod(shape) // per_block * block_bytes
            if end > len(self._bytes):
                raise DamagedError(f"tensor {name} ends beyond the {len(self._bytes):,} bytes there are")
            if self._bytes[end : aligned(end)].strip(b"\0"):  # all writers pad with zeros
                raise DamagedError(f"something follows tensor {name} where padding should be")
            self.tensors[name] = TensorInfo(shape, kind, start, end - start)
        if len(self._bytes) > aligned(end):
            raise DamagedError(f"{len(self._bytes) - end:,} bytes follow its last tensor")

    def _take(self, size: int) -> int:
        """Step over `size` bytes and return where they begin."""
        start = self._at
        if size > len(self._bytes) - start:
            raise DamagedError(f"{size:,} bytes are announced where {len(self._bytes) - start:,} are left")
        self._at = start + size
        return start

    def _number(self, code: str) -> int:
        number: int = struct.unpack_from("<" + code, self._bytes, self._take(struct.calcsize("<" + code)))[0]
        return number

    def _string(self) -> str:
        length = self._number("Q")
        start = self._take(length)
        return self._bytes[start : start + length].decode("utf-8")

    def _name(self) -> str:
        """A string that may stand in the sentence of an error."""
        name = self._string()
        if not is_name(name):
            raise DamagedError(f"{shortened(name)} is no name of a key or tensor")
        return name

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._number("I"), self._number("Q")
            if item in _SCALARS:
                return self._numbers(item, count)
            if item == _STRING and count * 8 <= len(self._bytes) - self._at:
                return [self._string() for _ in range(count)]
            raise DamagedError(f"an array holds {count} values of type {item}")
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise DamagedError(f"value type {kind} does not exist")
        dtype = np.dtype(_SCALARS[kind])
        numbers: list[Any] = np.frombuffer(self._bytes, dtype, count, self._take(count * dtype.itemsize)).tolist()
        return numbers

    def _tensor_header(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, axes = self._name(), self._number("I")
        if not 1 <= axes <= 4:
            raise DamagedError(f"tensor {name} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        if 0 in shape:
            raise DamagedError(f"tensor {name} has shape {list(shape)}")
        kind, offset = self._number("I"), self._number("Q")
        if kind not in {int(known) for known in GGML_QUANT_SIZES}:
            raise DamagedError(f"tensor {name} has the unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), offset

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of one tensor, mapped; to be used before the next one is asked for."""
        self._release()
        info = self._last = self.tensors[name]
        return np.frombuffer(self._bytes, np.uint8, info.size, info.start)

    def tensor(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One tensor as float32, of the shape in its TensorInfo; to be used before the next one is asked for.

        Raises:
            ValueError: it is quantised in a way the gguf package cannot undo.
        """
        info, raw = self.tensors[name], self.raw(name)
        if info.kind in _PLAIN:
            values = raw.view(_PLAIN[info.kind]).reshape(info.shape).astype(np.float32, copy=False)
        else:
            try:
                with np.errstate(invalid="ignore", over="ignore"):
                    values = dequantize(raw.reshape(*info.shape[:-1], -1), info.kind)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path}: tensor {name} is stored as {info.kind.name}, which cannot be read."
                ) from error
        return values

    def _release(self) -> None:
        """Give back the mapped pages of the tensor before, which otherwise stay for as long as the file is open."""
        if self._last is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            start = self._last.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, start, self._last.start + self._last.size - start)
