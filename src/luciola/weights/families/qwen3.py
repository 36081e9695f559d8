"""Qwen3 and R1-0528's distillation into it: queries and keys are normalised head by head."""

from luciola.weights.families import Family, tables
from luciola.weights.families.windows import read_windows

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="qwen3",
    gguf=tables.QWEN,
    defaults={"head_dim": 128},
    read=read_windows,
    qk_norm=True,
    windows=True,
)
