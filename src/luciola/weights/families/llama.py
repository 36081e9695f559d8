"""Llama 2 and 3, DeepSeek LLM 7B and 67B, R1's Llama distillations, SmolLM2."""

from luciola.weights.families import Family, tables

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="llama",
    gguf=tables.LLAMA,
    mlp_bias=True,
)
