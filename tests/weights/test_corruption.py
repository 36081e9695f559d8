"""Damaged and hostile model files: each ends in one sentence, or in the very model, never in a crash, hang or another one.

A damage has a name such as "qwen2/gguf/metadata byte/17", from which alone it is made: to see it again, call
`damaged("qwen2/gguf/metadata byte/17", folder)`. It is judged by what it must or may lead to:

NOTICED     a ValueError.
SAME        a ValueError, or a model with the logits of the undamaged one.
CONFIG      the same; or the file now states another legal configuration (config.json and GGUF's metadata have no
            checksums), which is what the loaded model has, with the same weights where they lie as they do in memory.
UNKNOWABLE  the same, or any model that can be run: what was changed is the data of a GGUF file, or a type of number to
            another with as many bytes, and GGUF has no checksums.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFValueType

import luciola
from luciola.text.tokenizer import Tokenizer
from luciola.weights.convert import convert
from luciola.weights.opening import open_checkpoint

SECONDS, MEMORY_MB = 5, 600
NOTICED, SAME, CONFIG, UNKNOWABLE = "noticed", "same", "config", "unknowable"
TOKENS = torch.arange(8)[None]

SHAPE = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SHAPE | {"num_key_value_heads": 1, "head_dim": 8}
LATENT = SHAPE | {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
EXPERTS["first_k_dense_replace"] = 1
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {  # and the type of number in the GGUF file
    "llama": (GROUPED, "f32"),
    "mistral": (GROUPED | {"sliding_window": 4}, "f16"),
    "qwen2": (GROUPED | {"tie_word_embeddings": True}, "q8_0"),
    "qwen3": (GROUPED | {"rope_scaling": YARN}, "bf16"),
    "deepseek": (GROUPED | EXPERTS, "f32"),
    "deepseek_v2": (LATENT | EXPERTS | {"rope_scaling": YARN}, "f16"),
    "deepseek_v3": (LATENT | EXPERTS | {"q_lora_rank": 6, "num_nextn_predict_layers": 1}, "f32"),
}
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
Files = dict[str, bytes]


# --- the undamaged models ---------------------------------------------------------------------------------------------


@dataclass
class Whole:
    """A model's files by name, and what it computes. `state` is empty where weights depend on the metadata."""

    files: Files
    config: Any
    logits: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def logits_of(lm: luciola.LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(TOKENS)


def written(family: str, form: str, folder: Path) -> Path:
    """The model with random weights in one of three forms: a folder, one with shards, a GGUF file."""
    shape, kind = FAMILIES[family]
    tokenizer = Tokenizer.characters("0123456789+-*/=() abc")
    lm = luciola.LanguageModel.create({"model_type": family, **shape, "initializer_range": 0.2}, tokenizer)
    lm.save(folder / "model")
    if form == "shards":
        luciola.weights.hf.save(lm.model, folder / "model", shard_bytes=16_000, eos_token_ids=tokenizer.eos_token_ids)
        (folder / "model" / luciola.weights.hf.SINGLE).unlink()
    if form == "gguf":
        convert(open_checkpoint(folder / "model"), folder / "model.gguf", "gguf", kind)
    return folder / ("model.gguf" if form == "gguf" else "model")


@cache
def whole(family: str, form: str, folder: Path) -> Whole:
    path = written(family, form, folder)
    lm = luciola.load(path)
    paths = [path] if path.is_file() else sorted(path.iterdir())
    state = {} if form == "gguf" else lm.model.state_dict()
    return Whole({file.name: file.read_bytes() for file in paths}, lm.config, logits_of(lm), state)


# --- damages to any file ----------------------------------------------------------------------------------------------


def replace_byte(content: bytes, at: int, rng: random.Random) -> bytes:
    other = rng.choice([0, 1, 0x22, 0x2C, 0x30, 0x7F, 0xFF, content[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    return content[:at] + bytes([other if other != content[at] else content[at] ^ 1]) + content[at + 1 :]


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


def cut(files: Files, rng: random.Random, number: int) -> str:
    name = weights_file(files, rng)
    start = header_end(files[name])
    length = number if number < start else rng.randrange(start, len(files[name]) - 32)
    files[name] = files[name][:length]  # an alignment's worth at the end may be padding
    return NOTICED


def pad(files: Files, rng: random.Random, number: int) -> str:
    name = weights_file(files, rng)
    size = rng.choice([32, 33, 4096, 1 << 20])  # less would complete the alignment
    files[name] += bytes(size) if number % 2 else rng.randbytes(size)
    return NOTICED


# --- damages to safetensors -------------------------------------------------------------------------------------------


def header_end(content: bytes) -> int:
    if content[:4] == b"GGUF":
        return gguf_regions(content)[2]
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


# --- damages to GGUF --------------------------------------------------------------------------------------------------


@cache
def gguf_regions(content: bytes) -> tuple[list[tuple[int, int, GGUFValueType]], int, int]:
    """Where each value in the metadata lies, with its size and type; where tensor infos, and where data begin."""
    with Path("regions.gguf").open("wb") as file:
        file.write(content)
    reader = GGUFReader("regions.gguf")
    values = []
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            start = entry.offset + 8 + len(entry.parts[1]) + 4
            values.append((start, sum(part.nbytes for part in entry.parts[3:]), entry.types[0]))
    return values, min(tensor.field.offset for tensor in reader.tensors), reader.data_offset


def gguf_infos(content: bytes) -> list[tuple[int, int]]:
    """Where the number of axes of each tensor lies, and how many there are; sizes, type and offset follow."""
    at, found = gguf_regions(content)[1], []
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
    infos = gguf_regions(files["model.gguf"])[1]
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(24, infos), rng)
    return CONFIG


def damage_metadata(files: Files, rng: random.Random, number: int) -> str:
    """Another number, length, type of value or type of an array's values."""
    values = gguf_regions(files["model.gguf"])[0]
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
    _, infos, data = gguf_regions(files["model.gguf"])
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(infos, data), rng)
    return SAME


def damage_info(files: Files, rng: random.Random, number: int) -> str:
    """Axes, sizes, types and offsets that lie; two tensors in one place, or each in the other's."""
    content = files["model.gguf"]
    (one, axes), (other, other_axes) = rng.sample(gguf_infos(content), 2)
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
    data = gguf_regions(files["model.gguf"])[2]
    files["model.gguf"] = replace_byte(files["model.gguf"], rng.randrange(data, len(files["model.gguf"])), rng)
    return UNKNOWABLE


# --- all of them ------------------------------------------------------------------------------------------------------

Damage = Callable[[Files, random.Random, int], str]
FOLDER: dict[str, tuple[Damage, int]] = {
    "config": (damage_config, 80),
    "tokenizer": (damage_tokenizer, 60),
    "folder": (damage_folder, 12),
    "length": (damage_length, 10),
    "header byte": (damage_header_byte, 40),
    "header": (damage_header, 48),
    "data": (damage_data, 15),
    "pad": (pad, 4),
}
DAMAGES: dict[str, dict[str, tuple[Damage, int]]] = {
    "single": FOLDER,
    "shards": {name: (damage, number // 3) for name, (damage, number) in FOLDER.items()}
    | {"index": (damage_index, 40)},
    "gguf": {
        "start": (damage_gguf_start, 20),
        "metadata byte": (damage_metadata_byte, 80),
        "metadata": (damage_metadata, 120),
        "info byte": (damage_info_byte, 50),
        "info": (damage_info, 60),
        "data": (damage_gguf_data, 15),
        "pad": (pad, 4),
    },
}


def cases(family: str, folder: Path) -> Iterator[str]:
    for form, damages in DAMAGES.items():
        files = whole(family, form, folder / form).files
        for name, (_, count) in damages.items():
            yield from (f"{family}/{form}/{name}/{number}" for number in range(count))
        if form != "shards":
            end = max(header_end(content) for name, content in files.items() if name.startswith("model."))
            step = 1 if family == "llama" else 13
            yield from (f"{family}/{form}/cut/{length}" for length in [*range(0, end, step), *range(end, end + 40)])


def damaged(case: str, folder: Path) -> tuple[Path, str, Whole]:
    """The damaged files of a case, what they must or may lead to, and the undamaged model."""
    family, form, name, number = case.split("/")
    original = whole(family, form, folder / form)
    files = dict(original.files)
    damage = cut if name == "cut" else DAMAGES[form][name][0]
    verdict = damage(files, random.Random(case), int(number))
    target = folder / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file, content in files.items():
        (target / file).write_bytes(content)
    return target / "model.gguf" if form == "gguf" else target, verdict, original


def judge(path: Path, verdict: str, original: Whole) -> str:
    """What is wrong with how these files were read; "" if nothing is."""
    try:
        lm = luciola.load(path)
    except ValueError as error:
        message = str(error)
        return "" if message.isprintable() and 20 < len(message) < 1000 else f"is answered {message[:2000]!r}"
    if verdict == NOTICED:
        return "is not noticed"
    if lm.tokenizer is not None:
        lm.tokenizer.decode(lm.tokenizer.encode("(1 + 2) * 3 = 9 <think> é"))
    logits = logits_of(lm)
    if torch.equal(logits, original.logits) or verdict == UNKNOWABLE:
        return ""
    if verdict == CONFIG and lm.config != original.config:
        state = lm.model.state_dict()
        changed = [name for name in original.state.keys() & state.keys() if not state[name].equal(original.state[name])]
        return f"changes the weights {changed}" if changed else ""
    return "gives another model"


def work(names: list[str], folder: Path, results: Connection) -> None:
    """Judge these cases, announcing each; too much memory is a MemoryError or a crash, too much time the end."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEMORY_MB << 20),) * 2)
    for case in names:
        results.send((case, None))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            wrong = judge(*damaged(case, folder))
        except BaseException as error:
            wrong = f"raises {type(error).__name__}: {str(error)[:300]}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        results.send((case, wrong))


@pytest.mark.parametrize("family", FAMILIES)
def test_damage_ends_in_one_sentence_or_in_the_same_model(
    family: str, workplace: Path, forks: ForkServerContext
) -> None:
    remaining = list(cases(family, workplace))
    assert len(remaining) > 800
    failures = {}
    while remaining:
        receiver, sender = forks.Pipe(duplex=False)
        process = forks.Process(target=work, args=(remaining, workplace, sender))
        process.start()
        sender.close()
        case, wrong = remaining[0], None
        try:
            while True:
                case, wrong = receiver.recv()
                if wrong:
                    failures[case] = wrong
        except EOFError:
            process.join()
        if process.exitcode:
            failures[case] = f"ends the process: {process.exitcode}"  # minus the signal; 14 is the clock
        remaining = remaining[remaining.index(case) + 1 :] if process.exitcode else []
    assert failures == {}
