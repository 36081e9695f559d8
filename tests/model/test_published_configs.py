"""The config.json files of published models, in the form they were published in, build models of the right size."""

from typing import Any

import pytest
import torch

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer

AUTO_MAP = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True, "torch_dtype": "bfloat16"}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "DeepSeek LLM 7B": (
        COMMON | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 100000,
            "eos_token_id": 100001, "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 4096, "num_hidden_layers": 30,
            "num_attention_heads": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 102400,
        },
        6_910_365_696,
    ),
    "DeepSeekMoE 16B": (
        COMMON | {
            "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "auto_map": AUTO_MAP,
            "attention_bias": False, "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001,
            "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "max_position_embeddings": 4096, "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
            "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 28,
            "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": True, "vocab_size": 102400,
        },
        16_375_728_128,
    ),
    "DeepSeek-V3 with FP8 weights": (
        COMMON | {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "auto_map": AUTO_MAP,
            "attention_bias": False, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
            "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
            "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
            "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "scoring_func": "sigmoid", "seq_aux": True,
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
            "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            },
        },
        671_026_404_352,
    ),
    "Llama 3.1 8B": (
        COMMON | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "mlp_bias": False,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "Mistral 7B v0.1": (
        COMMON | {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "R1-Distill-Qwen 1.5B": (
        COMMON | {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
            "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
            "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        1_777_088_000,
    ),
    "Qwen3 0.6B": (
        COMMON | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 1024, "intermediate_size": 3072,
            "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build_models_of_the_published_size(name: str) -> None:
    data, parameters = PUBLISHED[name]
    config = ModelConfig.from_hf(data)
    with torch.device("meta"):
        assert Transformer(config).num_parameters() == parameters
    assert ModelConfig.from_hf(config.to_hf()) == explicit(config)


def explicit(config: ModelConfig) -> ModelConfig:
    """head_dim is always written out."""
    return config if config.is_mla else config.model_copy(update={"head_dim": config.rope_dim})


def test_windows_are_those_of_the_files() -> None:
    mistral = ModelConfig.from_hf(PUBLISHED["Mistral 7B v0.1"][0])
    assert mistral.window(0) == mistral.window(31) == 4096
    qwen = PUBLISHED["R1-Distill-Qwen 1.5B"][0]
    assert ModelConfig.from_hf(qwen).window(27) is None
    windowed = ModelConfig.from_hf(qwen | {"use_sliding_window": True})
    assert [windowed.window(layer) for layer in (0, 20, 21, 27)] == [None, None, 4096, 4096]
    assert ModelConfig.from_hf(windowed.to_hf()) == explicit(windowed)
    assert (
        ModelConfig.from_hf(
            {name: value for name, value in qwen.items() if name != "sliding_window"} | {"use_sliding_window": True}
        ).window(27)
        == 4096
    ), "what transformers takes where the file does not say"


def test_rope_scaling_that_somebody_has_added_replaces_the_dictionary_of_transformers_5() -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    added = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    config = ModelConfig.from_hf(PUBLISHED["Qwen3 0.6B"][0] | plain | added)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0


def test_attn_factor_of_r1_s_qwen3_cancels_yarn_s_own() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    published = PUBLISHED["Qwen3 0.6B"][0] | {"rope_scaling": scaling | {"attn_factor": 0.8782488562869419}}
    config = ModelConfig.from_hf(published)
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == 1.0


def test_what_says_how_to_generate_is_passed_over_and_what_is_unknown_is_not() -> None:
    data = PUBLISHED["Qwen3 0.6B"][0] | {
        "top_k": 20,
        "max_length": 20,
        "unsloth_version": "1",
        "_attn_implementation": "",
    }
    assert ModelConfig.from_hf(data) == ModelConfig.from_hf(PUBLISHED["Qwen3 0.6B"][0])
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        ModelConfig.from_hf(data | {"partial_rotary_factor": 0.5})
