"""DeepSeekMoE 16B: Llama's attention with DeepSeekMoE's shared and routed experts (DeepSeekMoE paper, section 4)."""

from luciola.weights.families import Family, tables

FAMILY = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="deepseek",
    gguf=tables.DEEPSEEK,
    experts=True,
)
