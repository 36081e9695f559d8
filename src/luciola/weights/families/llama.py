"""Llama 2 and 3, DeepSeek LLM 7B and 67B, R1's Llama distillations, SmolLM2."""

from luciola.weights.families import Family, tables

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="llama",
    gguf=tables.EMBEDDINGS | tables.NORMS | tables.GQA_OF_NEIGHBOURS | tables.DENSE,
    mlp_bias=True,
)
