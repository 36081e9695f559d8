"""The shape of a model, with Hugging Face's field names, so that a published config.json can be read as it is.

Which attention and which feed-forward a layer has follows from the fields alone:

* `kv_lora_rank` set: multi-head latent attention (DeepSeek-V2, V3); absent: grouped-query attention (DeepSeek LLM,
DeepSeekMoE, Llama, Mistral, Qwen).
* `n_routed_experts` set: DeepSeekMoE from layer `first_k_dense_replace` on; absent: SwiGLU in every layer.

What a family does without saying so in its configuration (Qwen2's biases, Qwen3's norms) stands in its file in
`weights/families/`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from luciola.text.untrusted import shortened
from luciola.weights.families import FAMILIES, Family

Size = Annotated[int, Field(gt=0, lt=2**31)]  # beyond that a product of two no longer fits in a tensor's numbers
Positive = Annotated[float, Field(gt=1e-30, lt=1e38)]  # what float32 can be multiplied and divided by
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 stands for none in some published files
Layers = Field(le=1000)  # each is an object that has to be built; the deepest published model has 126

# Fields of published config.json files that say nothing about the computation.
IGNORED_HF_FIELDS = frozenset(
    [
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "pretraining_tp",
        "ep_size",
        "attention_dropout",
        "output_router_logits",
        "_name_or_path",
        "head_dim_original",
        "is_llama_config",
        "quantization_config",
        "qk_head_dim",
        "num_local_experts",
        "num_experts",
        "seq_aux",
        "aux_loss_alpha",
        "router_aux_loss_coef",
        "rope_interleaved",
        "transformers.js_config",
        "num_mtp_layers",
        "model_max_length",
        "max_sequence_length",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
        "is_encoder_decoder",
        "tokenizer_class",
        "use_mrope",
        "is_decoder",
        "add_cross_attention",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "prefix",
        "finetuning_task",
        "task_specific_params",
        "pruned_heads",
        "torchscript",
        "use_bfloat16",
        "language",
        # How to generate, where an old file says so beside the shape.
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "sep_token_id",
    ]
)


class RopeScaling(BaseModel):
    """How rotary frequencies are stretched beyond the length the model was pre-trained on.

    `yarn` is the form of DeepSeek-V2/V3 (YaRN paper, section 3; V3 report, section 4.3), `linear` divides every
    position by `factor`, `llama3` is the piecewise form of Llama 3.1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rope_type: Literal["yarn", "linear", "llama3"]
    factor: float = Field(ge=1, lt=1e38)
    original_max_position_embeddings: Size | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float | None = Field(default=None, ge=0, lt=1e38)
    mscale_all_dim: float | None = Field(default=None, ge=0, lt=1e38)
    attention_factor: Positive | None = None
    truncate: bool = True
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    @model_validator(mode="after")
    def _original_length_known(self) -> Self:
        if self.rope_type == "llama3" and self.original_max_position_embeddings is None:
            raise ValueError("rope_type 'llama3' needs original_max_position_embeddings: the length of pre-training")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor} must be above {self.low_freq_factor}, the low")
        return self


_ANY_ROPE = ("rope_type", "factor", "original_max_position_embeddings", "attention_factor")
_ROPE_FIELDS = {
    "linear": _ANY_ROPE,
    "llama3": (*_ANY_ROPE, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_ANY_ROPE, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


class ModelConfig(BaseModel):
    """Everything that fixes a Transformer's computation. Frozen; unknown fields are refused.

    Sizes count features or tokens. `head_dim` is grouped-query attention's width a head (default hidden_size /
    num_attention_heads); MLA's widths are `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model_type: str = "deepseek_v3"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[Size, Layers]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 4096
    initializer_range: Positive = 0.006
    rms_norm_eps: Positive = 1e-6
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None

    rope_theta: float = Field(default=10_000.0, gt=1, lt=1e38)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True  # MLA weights as DeepSeek publishes them pair neighbouring dimensions
    sliding_window: Size | None = None  # tokens that attention sees, its own included; None: all
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None  # None: all as above

    q_lora_rank: Size | None = None
    kv_lora_rank: Size | None = None
    qk_nope_head_dim: Size | None = None
    qk_rope_head_dim: Size | None = None
    v_head_dim: Size | None = None

    moe_intermediate_size: Size | None = None
    n_shared_experts: int | None = Field(default=None, ge=0, lt=2**31)
    n_routed_experts: Size | None = None
    num_experts_per_tok: Size | None = None
    first_k_dense_replace: int = Field(default=0, ge=0, lt=2**31)
    moe_layer_freq: Size = 1
    n_group: Size = 1
    topk_group: Size = 1
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] | None = None
    scoring_func: Literal["softmax", "sigmoid"] | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: Positive = 1.0

    num_nextn_predict_layers: Annotated[int, Field(ge=0), Layers] = 0

    @field_validator("model_type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FAMILIES:
            raise ValueError(f"{value!r} is not supported; this version reads {', '.join(FAMILIES)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, data: Any) -> Any:
        """Fill in what a family leaves unsaid: V2 gates by softmax, V3 by sigmoid with a selection bias."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        family = data.get("model_type", "deepseek_v3")

        def default(name: str, value: Any) -> None:
            if data.get(name) is None:
                data[name] = value

        if isinstance(data.get("num_attention_heads"), int):
            default("num_key_value_heads", data["num_attention_heads"])
        if data.get("n_routed_experts") is not None:
            v3 = family == "deepseek_v3"
            default("scoring_func", "sigmoid" if v3 else "softmax")
            default("topk_method", "noaux_tc" if v3 else "greedy")
            default("norm_topk_prob", v3)
            default("n_shared_experts", 0)
        for name in ("n_group", "topk_group"):
            default(name, 1)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if self.kv_lora_rank is None:
            if heads % kv_heads:
                raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
            if self.head_dim is None and self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} does not divide over num_attention_heads={heads}; set head_dim"
                )
            if self.rope_dim % 2:
                raise ValueError(f"head_dim={self.rope_dim} must be even: rotary embedding turns pairs")
        else:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is needed where kv_lora_rank is set (multi-head latent attention)")
            if self.rope_dim % 2:
                raise ValueError(f"qk_rope_head_dim={self.rope_dim} must be even: rotary embedding turns pairs")
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                raise ValueError("sliding_window is needed where layer_types names sliding_attention")
        if self.is_mla and not self.family.latent:
            raise ValueError(f"kv_lora_rank is set, and {self.model_type} models have no latent attention")
        if self.n_routed_experts is not None and not self.family.experts:
            raise ValueError(f"n_routed_experts is set, and {self.model_type} models have no experts")
        if self.mlp_bias and not self.family.mlp_bias:
            raise ValueError(f"mlp_bias is set, which {self.model_type} models do not have")
        if self.sliding_window is not None and not self.family.windows:
            raise ValueError(f"sliding_window={self.sliding_window} is set, which {self.model_type} models do not have")
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)
        elif self.num_experts_per_tok is not None:
            raise ValueError("num_experts_per_tok is set but n_routed_experts is not; set both or neither")
        return self

    def _check_experts(self, experts: int) -> None:
        if self.moe_intermediate_size is None or self.num_experts_per_tok is None:
            raise ValueError("moe_intermediate_size and num_experts_per_tok are needed where n_routed_experts is set")
        if experts % self.n_group:
            raise ValueError(f"n_routed_experts={experts} does not divide over n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        reachable = experts // self.n_group * self.topk_group if self.topk_method != "greedy" else experts
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {reachable} experts that "
                f"topk_group={self.topk_group} of n_group={self.n_group} leave to choose from"
            )

    @property
    def family(self) -> Family:
        """What sets this model's family apart."""
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias if self.family.qkv_bias is None else self.family.qkv_bias

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.family.output_bias is None else self.family.output_bias

    def window(self, layer: int) -> int | None:
        """How many tokens attention of layer number `layer` sees, its own included; None: all before it."""
        types = self.layer_types
        if types is not None and types[min(layer, len(types) - 1)] == "full_attention":  # an MTP block is like the last
            return None
        return self.sliding_window

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def rope_dim(self) -> int:
        """Features a head that carry the position."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim or 0
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def cached_per_token_and_layer(self) -> int:
        """Numbers the cache keeps for one token in one layer: d_c + d_r with MLA, 2 n_kv d_h with GQA (V2 paper, table
        1)."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.rope_dim
        return 2 * (self.num_key_value_heads or self.num_attention_heads) * self.rope_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (MTP layers count on from num_hidden_layers) has routed experts."""
        if self.n_routed_experts is None:
            return False
        return layer >= self.num_hidden_layers or (
            layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        )

    @property
    def attention_scale(self) -> float:
        """The factor on query-key products: width ** -0.5, times YaRN's squared temperature (V2 paper, 3.1.4)."""
        if not self.is_mla:
            return float(self.rope_dim**-0.5)
        scale: float = ((self.qk_nope_head_dim or 0) + self.rope_dim) ** -0.5
        rope = self.rope_scaling
        if rope is not None and rope.rope_type == "yarn" and rope.mscale_all_dim:
            scale *= yarn_temperature(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_hf(cls, data: dict[str, Any]) -> ModelConfig:
        """Read the content of a published config.json, 4.x form (rope_theta, rope_scaling) or 5.x (rope_parameters).

        Raises ValueError for an unknown model_type or a field that changes the computation and is not supported.
        """
        data = {k: v for k, v in data.items() if k not in IGNORED_HF_FIELDS and not k.startswith(("_", "unsloth"))}
        family = FAMILIES.get(str(data.get("model_type")))
        if family is None:
            found, known = shortened(data.get("model_type")), ", ".join(FAMILIES)
            raise ValueError(f"model_type {found} is not supported; this version reads {known}")
        data = {**family.defaults, **data}
        family.read(data)
        # transformers 5 lets the old pair, where somebody has added it, replace its own dictionary.
        rope = data.pop("rope_scaling", None) or data.get("rope_parameters")
        data.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict):
                raise ValueError(f"rope_scaling must be an object with type and factor, not a {type(rope).__name__}")
            rope = dict(rope)
            kind = rope.pop("type", None) or "default"
            rope["rope_type"] = rope.get("rope_type") or kind
            data["rope_theta"] = rope.pop("rope_theta", None) or data.get("rope_theta") or 10_000.0
            if "attn_factor" in rope:  # R1-0528-Qwen3's factor beside YaRN's own, as vLLM and llama.cpp take it
                usual = yarn_temperature(float(rope.get("factor") or 1.0), 1.0)
                rope["attention_factor"] = round(float(rope.pop("attn_factor")) * usual, 6)
            if rope["rope_type"] != "default":
                data["rope_scaling"] = {k: v for k, v in rope.items() if v is not None}
        for name in [name for name, value in data.items() if value is None]:
            del data[name]
        if data.get("kv_lora_rank") is not None and data.get("head_dim") == data.get("qk_rope_head_dim"):
            data.pop("head_dim", None)
        layers, dense = data.get("num_hidden_layers"), data.get("first_k_dense_replace")
        all_dense = isinstance(layers, int) and isinstance(dense, int) and dense >= layers
        if all_dense and "num_experts_per_tok" not in data and not data.get("num_nextn_predict_layers"):
            data.pop("n_routed_experts", None)  # the oracle's V2 states its default even where no layer has experts
        return cls.model_validate(data)

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json, in the form that transformers 4.x and 5.x and vLLM all read."""
        data = self.model_dump(exclude_none=True)
        scaling = data.pop("rope_scaling", None)
        if scaling is not None:
            kind = scaling["rope_type"]
            data["rope_scaling"] = {"type": kind} | {k: v for k, v in scaling.items() if k in _ROPE_FIELDS[kind]}
        if not self.is_mla:
            data.pop("rope_interleave")
            data["head_dim"] = self.rope_dim
        elif self.q_lora_rank is None:
            data["q_lora_rank"] = None  # the class default of the oracle is 1536, so silence would not mean "none"
        if self.n_routed_experts is None and self.is_mla:
            data["first_k_dense_replace"] = self.num_hidden_layers  # silence would mean the oracle's 256 experts
        if self.n_routed_experts is None and not self.is_mla:
            for name in ("n_group", "topk_group", "moe_layer_freq", "first_k_dense_replace", "routed_scaling_factor"):
                data.pop(name)
        if not self.num_nextn_predict_layers and not self.is_mla:
            data.pop("num_nextn_predict_layers")
        if "sliding_window" in self.family.defaults:
            data.setdefault("sliding_window", None)  # where silence would mean a window
        elif self.sliding_window is not None:
            types = [
                "full_attention" if self.window(n) is None else "sliding_attention"
                for n in range(self.num_hidden_layers)
            ]
            data |= {"use_sliding_window": True, "layer_types": types}
        return {"architectures": [self.family.architecture], **data, "torch_dtype": "float32"}


def yarn_temperature(factor: float, mscale: float) -> float:
    """YaRN's attention temperature g(m) = 0.1 m ln(s) + 1 (1 where nothing is stretched)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
