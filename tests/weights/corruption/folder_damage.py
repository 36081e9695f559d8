"""Damages to a Hugging Face folder: its JSON files, the safetensors, and which files there are."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from verdicts import CONFIG, NOTICED, SAME, Files, replace_byte

NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 33, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**40, -(2**63)),
    *(0.5, -0.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), "", "2", "x", "nan", "../x", "\n", "\ud800"),
    *(
        [],
        [1],
        ["1"],
        [[]],
        [2, "x"],
        {},
        {"a": 1},
        {"type": "yarn"},
        {"type": "yarn", "factor": 1e-320},
        "y" * 100_000,
    ),
    *({"type": "linear", "factor": 0.0}, {"type": "linear", "factor": 1e300}, {"content": 3}, {"content": None}),
]


def edit_value(text: bytes, rng: random.Random) -> bytes:
    """JSON with one value somewhere replaced, left out, or stated twice."""
    content = json.loads(text)
    place, parent = content, content
    while isinstance(place, dict | list) and place:
        parent = place
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        place = place[key]
        if rng.random() < 0.3:
            break
    how = rng.random()
    if how < 0.1:
        del parent[key]
    elif how < 0.2 and isinstance(parent, dict):
        parent["\x00twice"] = rng.choice(NASTY)
        return json.dumps(content).replace('"\\u0000twice"', json.dumps(str(key))).encode()
    elif how < 0.25:
        parent[key] = "\x00deep"
        return json.dumps(content).replace('"\\u0000deep"', "[" * 100_000 + "]" * 100_000).encode()
    else:
        parent[key] = rng.choice(NASTY)
    return json.dumps(content).encode()


def damage_json(files: Files, name: str, rng: random.Random) -> None:
    how = rng.random()
    if how < 0.7:
        files[name] = edit_value(files[name], rng)
    elif how < 0.95:
        files[name] = replace_byte(files[name], rng.randrange(len(files[name])), rng)
    else:
        files[name] = files[name][: rng.randrange(len(files[name]))]


def damage_config(files: Files, rng: random.Random, number: int) -> str:
    damage_json(files, "config.json", rng)
    return CONFIG


def damage_tokenizer(files: Files, rng: random.Random, number: int) -> str:
    names = ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    damage_json(files, rng.choice([*names, "generation_config.json"]), rng)
    return SAME


def damage_folder(files: Files, rng: random.Random, number: int) -> str:
    """A file missing, empty, or holding what belongs into another."""
    one, other = rng.sample(sorted(files), 2)
    if number % 3 == 0:
        del files[one]
    elif number % 3 == 1:
        files[one] = b""
    else:
        files[one], files[other] = files[other], files[one]
    return SAME


def damage_index(files: Files, rng: random.Random, number: int) -> str:
    name = "model.safetensors.index.json"
    index = json.loads(files[name])
    weight_map = index["weight_map"]
    tensor = rng.choice(list(weight_map))
    shard = weight_map[tensor]
    elsewhere = ["../model.safetensors", f"/tmp/{shard}", f"./{shard}", "\ud800.safetensors", "a\n.safetensors", "none"]
    if number % 4 == 0:
        weight_map[tensor] = rng.choice([*elsewhere, *set(weight_map.values()), *NASTY])
    elif number % 4 == 1:
        weight_map[rng.choice([f"{tensor}x", "model.layers.7.mlp.gate.weight", "a\nb", ""])] = shard
    elif number % 4 == 2:
        del weight_map[tensor]
    else:
        damage_json(files, name, rng)
        return SAME
    files[name] = json.dumps(index).encode()
    return SAME


def weights_file(files: Files, rng: random.Random) -> str:
    return rng.choice([name for name in sorted(files) if name.endswith((".safetensors", ".gguf"))])


def header_end(content: bytes) -> int:
    """Where the data of a safetensors file begin."""
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def damage_length(files: Files, rng: random.Random, number: int) -> str:
    name = weights_file(files, rng)
    length = header_end(files[name]) - 8
    near = length + rng.choice([-9, -8, -1, 1, 2, 8, 100])
    wrong = rng.choice([0, 1, 2, near, near, len(files[name]), 10**8, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)])
    files[name] = struct.pack("<Q", wrong) + files[name][8:]
    return NOTICED


def damage_header_byte(files: Files, rng: random.Random, number: int) -> str:
    name = weights_file(files, rng)
    files[name] = replace_byte(files[name], rng.randrange(8, header_end(files[name])), rng)
    return SAME


def damage_header(files: Files, rng: random.Random, number: int) -> str:
    """The JSON of the header edited, with its length put right."""
    name = weights_file(files, rng)
    end = header_end(files[name])
    header, data = json.loads(files[name][8:end]), files[name][end:]
    one, other = rng.choices([key for key in header if key != "__metadata__"], k=2)
    begin, stop = header[one]["data_offsets"]
    edits: list[Callable[[], Any]] = [
        lambda: header.update({one: header[other], other: header[one]}),
        lambda: header[one].update(data_offsets=header[other]["data_offsets"]),
        lambda: header[one].update(data_offsets=[begin, stop + rng.choice([-4, 4, 2**40, 2**63, 2**64 - 1 - stop])]),
        lambda: header[one].update(data_offsets=[begin + rng.choice([-4, 4, -(2**40), 2**63]), stop]),
        lambda: header[one].update(shape=header[one]["shape"][::-1]),
        lambda: header[one].update(
            shape=rng.choice([[], [0], [-1], [2**32, 2**32], [2**63, 2], [1.5], ["x"], None, 7])
        ),
        lambda: header[one].update(shape=[1, *header[one]["shape"]]),
        lambda: header[one].update(dtype=rng.choice(["F64", "I32", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F9", 1, None])),
        lambda: header.pop(one),
        lambda: header.update({f"{one}x": header.pop(one)}),
        lambda: header.update({f"{one}\n\x1b[31m": header.pop(one)}),
        lambda: header.update({"model.extra": header[one]}),
        lambda: header.update({"model.extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}}),
        lambda: header.update(__metadata__=rng.choice(NASTY)),
        lambda: header["__metadata__"].update(
            {"luciola.crc32": rng.choice(["{}", "[", "[" * 10**5, "null", "{1", "7"])}
        ),
    ]
    if number % (len(edits) + 1) == len(edits):
        text = edit_value(json.dumps(header).encode(), rng)
    else:
        edits[number % (len(edits) + 1)]()
        text = json.dumps(header).encode()
    files[name] = struct.pack("<Q", len(text)) + text + data
    return SAME


def damage_data(files: Files, rng: random.Random, number: int) -> str:
    name = weights_file(files, rng)
    files[name] = replace_byte(files[name], rng.randrange(header_end(files[name]), len(files[name])), rng)
    return NOTICED


def cut(files: Files, rng: random.Random, length: int) -> str:
    files["model.safetensors"] = files["model.safetensors"][:length]
    return NOTICED


def cuts(content: bytes, step: int) -> list[int]:
    """Lengths to cut at: all over the header, and some in the data."""
    start = header_end(content)
    return [*range(0, start, step), *range(start, len(content), (len(content) - start) // 40)]


def pad(files: Files, rng: random.Random, number: int) -> str:
    files[weights_file(files, rng)] += rng.randbytes([1, 8, 4096, 1 << 20][number])
    return NOTICED


SINGLE = {
    "config": (damage_config, 80),
    "tokenizer": (damage_tokenizer, 60),
    "folder": (damage_folder, 12),
    "length": (damage_length, 10),
    "header byte": (damage_header_byte, 40),
    "header": (damage_header, 48),
    "data": (damage_data, 15),
    "pad": (pad, 4),
}
SHARDS = {name: (damage, max(4, number // 3)) for name, (damage, number) in SINGLE.items()}
SHARDS["index"] = (damage_index, 40)
