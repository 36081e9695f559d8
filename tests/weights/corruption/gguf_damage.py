"""Damages to a GGUF file: its start, its metadata, the tensors' infos and their data."""

import random
import struct
import tempfile
from functools import cache
from typing import Any

from gguf import GGUFReader, GGUFValueType
from verdicts import CONFIG, NOTICED, SAME, UNKNOWABLE, Files, replace_byte


@cache
def regions(content: bytes) -> tuple[list[tuple[int, int, GGUFValueType]], int, int]:
    """Where each value in the metadata lies, with its size and type; where tensor infos, and where data begin."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content)
        file.flush()
        reader = GGUFReader(file.name)
    values = []
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            start = entry.offset + 8 + len(entry.parts[1]) + 4
            values.append((start, sum(part.nbytes for part in entry.parts[3:]), entry.types[0]))
    return values, min(tensor.field.offset for tensor in reader.tensors), reader.data_offset


def infos_of(content: bytes) -> list[tuple[int, int]]:
    """Where the number of axes of each tensor lies, and how many there are; sizes, type and offset follow."""
    at, found = regions(content)[1], []
    for _ in range(struct.unpack_from("<Q", content, 8)[0]):
        at += 8 + struct.unpack_from("<Q", content, at)[0]
        axes = struct.unpack_from("<I", content, at)[0]
        found.append((at, axes))
        at += 4 + 8 * axes + 12
    return found


def overwrite(content: bytes, at: int, form: str, value: Any) -> bytes:
    new = struct.pack(f"<{form}", value)
    return content[:at] + new + content[at + len(new) :]


def damage_gguf_start(files: Files, rng: random.Random, number: int) -> str:
    content = files["model.gguf"]
    if number % 2:
        files["model.gguf"] = replace_byte(content, rng.randrange(24), rng)
    else:
        count = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, struct.unpack_from("<Q", content, 8)[0] - 1])
        files["model.gguf"] = overwrite(content, rng.choice([8, 16]), "Q", count)
    return SAME


def damage_metadata_byte(files: Files, rng: random.Random, number: int) -> str:
    infos = regions(files["model.gguf"])[1]
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(24, infos), rng)
    return CONFIG


def damage_metadata(files: Files, rng: random.Random, number: int) -> str:
    """Another number, length, type of value or type of an array's values."""
    values = regions(files["model.gguf"])[0]
    at, _, kind = values[number % len(values)]
    forms = {GGUFValueType.UINT32: "I", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "B"}
    if rng.random() < 0.2:
        at, form, value = at - 4, "I", rng.choice([*range(14), 2**32 - 1])
    elif kind in forms:
        form = forms[kind]
        odd = [0.0, -1.0, 1e-38, 3e38, 2.0, float("nan"), float("inf"), -float("inf")]
        value = rng.choice(odd if form == "f" else [0, 1, 2, 255] if form == "B" else [*range(9), 33, 2**31, 2**32 - 1])
    else:
        at += 4 * (kind == GGUFValueType.ARRAY and rng.random() < 0.7)
        form, value = "Q", rng.choice([0, 1, 8, 2**20, 2**31, 2**60, 2**63, 2**64 - 1])
    files["model.gguf"] = overwrite(files["model.gguf"], at, form, value)
    return CONFIG


def damage_info_byte(files: Files, rng: random.Random, number: int) -> str:
    _, infos, data = regions(files["model.gguf"])
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(infos, data), rng)
    return SAME


def damage_info(files: Files, rng: random.Random, number: int) -> str:
    """Axes, sizes, types and offsets that lie; two tensors in one place, or each in the other's."""
    content = files["model.gguf"]
    (one, axes), (other, other_axes) = rng.sample(infos_of(content), 2)
    kind, offset, other_offset = one + 4 + 8 * axes, one + 8 + 8 * axes, other + 8 + 8 * other_axes
    first, second = (struct.unpack_from("<Q", content, at)[0] for at in (offset, other_offset))
    huge = [0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
    verdict = SAME
    if number % 5 == 0:
        content = overwrite(overwrite(content, offset, "Q", second), other_offset, "Q", first)
    elif number % 5 == 1:
        content = overwrite(
            content, offset, "Q", rng.choice([second, first + 1, first + 32, first - 32 & 2**64 - 1, *huge])
        )
    elif number % 5 == 2:
        content = overwrite(content, one + 4 + 8 * rng.randrange(axes), "Q", rng.choice([*huge, 16, 64, 31]))
    elif number % 5 == 3:
        content = overwrite(content, one, "I", rng.choice([0, 1, 2, 3, 4, 5, 255, 2**32 - 1]))
    else:
        was, now = struct.unpack_from("<I", content, kind)[0], rng.choice([*range(42), 2**32 - 1])
        content = overwrite(content, kind, "I", now)
        verdict = UNKNOWABLE if {was, now} == {1, 30} else SAME  # half precision of either sort
    files["model.gguf"] = content
    return verdict


def damage_gguf_data(files: Files, rng: random.Random, number: int) -> str:
    data = regions(files["model.gguf"])[2]
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(data, len(files["model.gguf"])), rng)
    return UNKNOWABLE


def cut(files: Files, rng: random.Random, length: int) -> str:
    files["model.gguf"] = files["model.gguf"][:length]
    return NOTICED


def cuts(content: bytes, step: int) -> list[int]:
    """Lengths to cut at: all over the header, and some in the data; less than an alignment's worth may be padding."""
    start = regions(content)[2]
    return [*range(0, start, step), *range(start, len(content) - 32, (len(content) - start) // 40)]


def pad(files: Files, rng: random.Random, number: int) -> str:
    files["model.gguf"] += rng.randbytes([32, 33, 4096, 1 << 20][number])  # less would complete the alignment
    return NOTICED


DAMAGES = {
    "start": (damage_gguf_start, 20),
    "metadata byte": (damage_metadata_byte, 80),
    "metadata": (damage_metadata, 140),
    "info byte": (damage_info_byte, 50),
    "info": (damage_info, 60),
    "data": (damage_gguf_data, 15),
    "pad": (pad, 4),
}
