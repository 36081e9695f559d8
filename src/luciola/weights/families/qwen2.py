"""Qwen2 and 2.5, and R1's distillations into them: biases on queries, keys and values, none on the output."""

from luciola.weights.families import Family, tables
from luciola.weights.families.windows import read_windows

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="qwen2",
    gguf=tables.QWEN,
    read=read_windows,
    qkv_bias=True,
    output_bias=False,
    windows=True,
)
