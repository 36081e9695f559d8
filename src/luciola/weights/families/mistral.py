"""Mistral 7B: Llama without biases, whose attention may look back only `sliding_window` tokens (in version 0.1)."""

from luciola.weights.families import Family, tables

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="llama",
    gguf=tables.LLAMA,
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    qkv_bias=False,
    output_bias=False,
    windows=True,
)
