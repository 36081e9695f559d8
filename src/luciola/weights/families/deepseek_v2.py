"""DeepSeek-V2, V2-Lite and Coder-V2: multi-head latent attention, experts gated by softmax."""

from luciola.weights.families import Family, tables

FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="deepseek2",
    gguf=tables.DEEPSEEK2,
    gguf_older=tables.MLA_BEFORE_ABSORPTION,
    latent=True,
    experts=True,
)
