"""Sixteen sequences at once, new tokens a second, 32-token prompts included: a V3-style model and SmolLM2-135M.

Against transformers the V3-style model in one batch, float32. Against llama.cpp its server with sixteen slots and
sixteen requests at the same time, on the Q4_1 file that its users would take, beside all of our precisions that are
worth a try here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from luciola.bench.contenders import precisions, race
from luciola.bench.subjects import SMOLLM2, SMOLLM2_VOCABULARY, V3_SHAPE, random_prompts, smollm2_file, v3_folder
from luciola.bench.turns import machine

PEERS = ("transformers", "llama.cpp")
ROUNDS, WARMUP = 2, 1
ROWS, PROMPT, NEW_TOKENS = 16, 32, 64


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Tokens a second of all contenders, and the ratio of our best precision to the peer."""
    with tempfile.TemporaryDirectory() as folder:
        if against == "transformers":
            model = v3_folder(Path(folder))
            prompts = random_prompts(V3_SHAPE["vocab_size"], ROWS, PROMPT, WARMUP + ROUNDS)
            result = race(model, ["float32"], against, {"float32": model}, prompts, NEW_TOKENS, WARMUP)
            package = against
        else:
            files = {"q4_1": smollm2_file(Path(folder), "q4_1")}
            prompts = random_prompts(SMOLLM2_VOCABULARY, ROWS, PROMPT, WARMUP + ROUNDS)
            result = race(SMOLLM2, precisions(), against, files, prompts, NEW_TOKENS, WARMUP)
            package = "xllamacpp"
    return {**result, "sequences": ROWS, "prompt": PROMPT, "new_tokens": NEW_TOKENS, **machine(package)}
