"""DeepSeek-V3 and R1: latent attention, experts gated by sigmoid and steered by a bias, multi-token prediction."""

from typing import Any

from luciola.weights.families import Family, tables


def _read(data: dict[str, Any]) -> None:
    """Gating is sigmoid with a selection bias, whatever a config repeats; the oracle hard-codes it as well."""
    data.pop("scoring_func", None)
    data.pop("topk_method", None)


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    hugging_face=tables.DECODER,
    gguf_architecture="deepseek2",
    gguf=tables.DEEPSEEK2,
    gguf_older=tables.MLA_BEFORE_ABSORPTION,
    read=_read,
    latent=True,
    experts=True,
    stated=("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"),
)
