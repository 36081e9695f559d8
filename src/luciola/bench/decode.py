"""Greedy decoding, tokens a second, 32-token prompts included: a V3-style model and SmolLM2-135M, same weights.

Against transformers one sequence and sixteen of the 10M-parameter V3-style model (MLA and MoE, float32). Against
llama.cpp one sequence of SmolLM2, each of our precisions beside the file of llama.cpp's that keeps as many bits.
Decoding one sequence is a matter of bytes read, so those figures stand beside the measured memory bandwidth too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from luciola import hardware
from luciola.bench.contenders import LLAMA_CPP, race
from luciola.bench.subjects import SMOLLM2, SMOLLM2_VOCABULARY, V3_SHAPE, random_prompts, smollm2_file, v3_folder
from luciola.bench.turns import machine

PEERS = ("transformers", *LLAMA_CPP)
ROUNDS, WARMUP = 5, 1
PROMPT, NEW_TOKENS = 32, 128
BESIDE = {"float32": "f32", "int8": "q8_0", "int4": "q4_1"}  # ours, and llama.cpp's kind of file


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Tokens a second of both and their ratio for each setting."""
    with tempfile.TemporaryDirectory() as folder:
        results = _v3(Path(folder)) if against == "transformers" else _smollm2(Path(folder), against)
    packages = {"llama.cpp": ("xllamacpp",)}.get(against, (against,))
    return {**results, "prompt": PROMPT, "new_tokens": NEW_TOKENS, **machine(*packages)}


def _v3(folder: Path) -> dict[str, Any]:
    model = v3_folder(folder)
    results = {}
    for name, rows in (("one_sequence", 1), ("sixteen_sequences", 16)):
        prompts = random_prompts(V3_SHAPE["vocab_size"], rows, PROMPT, WARMUP + ROUNDS)
        results[name] = race(model, ["float32"], "transformers", {"float32": model}, prompts, NEW_TOKENS, WARMUP)
        del results[name]["weight_bytes"]  # of a mixture of experts a token reads but a part
    return results


def _smollm2(folder: Path, against: str) -> dict[str, Any]:
    prompts = random_prompts(SMOLLM2_VOCABULARY, 1, PROMPT, WARMUP + ROUNDS)
    results: dict[str, Any] = {}
    for precision, kind in BESIDE.items():
        files = {kind: smollm2_file(folder, kind)}
        results[precision] = race(SMOLLM2, [precision], against, files, prompts, NEW_TOKENS, WARMUP)
        read = results[precision]["weight_bytes"][precision] * results[precision]["tokens_per_second"][precision]
        results[precision]["share_of_bandwidth"] = read / hardware.bandwidth()
    return {**results, "bandwidth_gb_per_s": hardware.bandwidth() / 1e9}
