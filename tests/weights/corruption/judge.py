"""Damages model files and judges how they are read: `python judge.py FOLDER CASE...` prints what is wrong with each.

A damage has a name such as "qwen2/gguf/metadata byte/17" (family, form, kind, number), from which alone it is made. A
family alone stands for all its cases. Each is announced on a line before it begins, since it may end the process: by
taking more than SECONDS, or more than MEMORY_MB in a way that is no MemoryError.
"""

import contextlib
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import folder_damage
import gguf_damage
import tokenizers
import torch
from tokenizers import decoders, models
from verdicts import CONFIG, NOTICED, UNKNOWABLE, Files

import luciola
from luciola.text.bpe import train_bpe
from luciola.text.tokenizer import Tokenizer
from luciola.weights import hf
from luciola.weights.convert import convert
from luciola.weights.gguf_tokenizer import spaces_written_out
from luciola.weights.opening import open_checkpoint

SECONDS, MEMORY_MB = 5, 600
TOKENS = torch.arange(8)[None]
TEXT = "(1 + 2) * 3 = 9 <think> the é"

SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SHAPE | {"num_key_value_heads": 1, "head_dim": 16}
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
DAMAGES: dict[str, dict[str, Any]] = {
    "single": folder_damage.SINGLE,
    "shards": folder_damage.SHARDS,
    "gguf": gguf_damage.DAMAGES,
}


@dataclass
class Whole:
    """A model's files by name, and what it computes. `state` is empty where weights depend on the metadata."""

    files: Files
    config: Any
    logits: torch.Tensor
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def tokenizer_for(family: str) -> Tokenizer:
    """Of each kind that GGUF knows: bytes with merges, SentencePiece's, single characters."""
    if family.startswith("qwen"):
        return train_bpe(["the cat the mat the hat"] * 4, 290)
    if family == "mistral":
        pieces = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "▁",
            "t",
            "h",
            "e",
            "▁t",
            "▁the",
            "he",
        ]
        vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
        model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = spaces_written_out(True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
        backend.decoder = decoders.Sequence(steps)
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        return Tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0].content }}")
    return Tokenizer.characters("0123456789+-*/=() abcthe")


def written(family: str, form: str, folder: Path) -> Path:
    """The model with random weights in one of three forms: a folder, one with shards, a GGUF file."""
    shape, kind = FAMILIES[family]
    tokenizer = tokenizer_for(family)
    rows = {"vocab_size": tokenizer.vocab_size + 1, "initializer_range": 0.2}
    lm = luciola.LanguageModel.create({"model_type": family, **shape, **rows}, tokenizer)
    lm.save(folder / "model")
    if form == "shards":
        hf.save(lm.model, folder / "model", shard_bytes=16_000, eos_token_ids=tokenizer.eos_token_ids)
        (folder / "model" / hf.SINGLE).unlink()
    if form == "gguf":
        convert(open_checkpoint(folder / "model"), folder / "model.gguf", "gguf", kind)
    return folder / ("model.gguf" if form == "gguf" else "model")


def logits_of(lm: luciola.LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(TOKENS)


@cache
def whole(family: str, form: str, folder: Path) -> Whole:
    path = written(family, form, folder)
    lm = luciola.load(path)
    paths = [path] if path.is_file() else sorted(path.iterdir())
    state = {} if form == "gguf" else lm.model.state_dict()
    return Whole({file.name: file.read_bytes() for file in paths}, lm.config, logits_of(lm), state)


def cases(family: str, folder: Path) -> Iterator[str]:
    for form, damages in DAMAGES.items():
        for name, (_, count) in damages.items():
            yield from (f"{family}/{form}/{name}/{number}" for number in range(count))
    step = 1 if family == "llama" else 29
    for form, file, cuts in (
        ("single", hf.SINGLE, folder_damage.cuts),
        ("gguf", "model.gguf", gguf_damage.cuts),
    ):
        content = whole(family, form, folder / form).files[file]
        yield from (f"{family}/{form}/cut/{length}" for length in cuts(content, step))


def damaged(case: str, folder: Path) -> tuple[Path, str, Whole]:
    """The damaged files of a case, what they must or may lead to, and the undamaged model."""
    family, form, name, number = case.split("/")
    original = whole(family, form, folder / form)
    files = dict(original.files)
    cut = gguf_damage.cut if form == "gguf" else folder_damage.cut
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
        with contextlib.suppress(ValueError):
            lm.tokenizer.decode(lm.tokenizer.encode(TEXT))
    logits = logits_of(lm)
    if torch.equal(logits, original.logits) or verdict == UNKNOWABLE:
        return ""
    if verdict == CONFIG and lm.config != original.config:
        state = lm.model.state_dict()
        changed = [name for name in original.state.keys() & state.keys() if not state[name].equal(original.state[name])]
        return f"changes the weights {changed}" if changed else ""
    return "gives another model"


def main(folder: Path, names: list[str]) -> None:
    asked = [case for name in names for case in (cases(name, folder) if name in FAMILIES else [name])]
    for family, form in {tuple(case.split("/")[:2]) for case in asked}:
        whole(family, form, folder / form)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEMORY_MB << 20),) * 2)
    print(json.dumps(asked), flush=True)
    for case in asked:
        print(json.dumps(case), flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            wrong = judge(*damaged(case, folder))
        except BaseException as error:
            wrong = f"raises {type(error).__name__}: {str(error)[:300]}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        if wrong:
            print(json.dumps([case, wrong]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
