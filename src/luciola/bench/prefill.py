"""Prefill, tokens a second of one 1,200-token prompt up to its first new token: a V3-style model and SmolLM2-135M.

Against transformers the V3-style model in float32; against llama.cpp all of our precisions beside its F32 and Q4_1
files, the faster of which counts. Every prompt is new, so that no prompt cache takes part.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from luciola import hardware
from luciola.bench.contenders import LLAMA_CPP, precisions, race
from luciola.bench.subjects import (
    SMOLLM2,
    SMOLLM2_VOCABULARY,
    V3_SHAPE,
    prefill_flops,
    random_prompts,
    smollm2_file,
    v3_folder,
)
from luciola.bench.turns import machine

PEERS = ("transformers", *LLAMA_CPP)
ROUNDS, WARMUP = 2, 1
PROMPT = 1200


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Tokens a second of all contenders, the ratio of our best to the peer's best, and the share of the GEMM peak."""
    from luciola.model.language_model import load

    with tempfile.TemporaryDirectory() as folder:
        if against == "transformers":
            model: str | Path = v3_folder(Path(folder))
            prompts = random_prompts(V3_SHAPE["vocab_size"], 1, PROMPT, WARMUP + ROUNDS)
            result = race(model, ["float32"], against, {"float32": model}, prompts, 1, WARMUP)
        else:
            model = SMOLLM2
            prompts = random_prompts(SMOLLM2_VOCABULARY, 1, PROMPT, WARMUP + ROUNDS)
            files = {kind: smollm2_file(Path(folder), kind) for kind in ("f32", "q4_1")}
            result = race(model, precisions(), against, files, prompts, 1, WARMUP)
        flops = prefill_flops(load(model).model, PROMPT)
    best = result["best"]
    peak = hardware.gemm_peak("bfloat16" if best == "bfloat16" else "float32")  # quantised weights become float32
    result["share_of_peak"] = result["tokens_per_second"][best] / PROMPT * flops / peak
    del result["weight_bytes"]
    facts = {"prompt": PROMPT, "gflop_per_prompt": flops / 1e9, "gemm_peak_gflops": peak / 1e9}
    packages = {"llama.cpp": ("xllamacpp",)}.get(against, (against,))
    return {**result, **facts, **machine(*packages)}
