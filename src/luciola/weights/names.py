"""Where each tensor of a Transformer stands in a file: one declarative table per family, read in both directions.

A parameter's name in memory is the name Hugging Face gives it, without the leading "model.". Only two things differ on
disk: the routed experts, one fused stack in memory, are separate tensors, and a multi-token prediction module is the
layer after the last one. A family whose names are Hugging Face's own needs one line in FAMILIES.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from luciola.model.config import ModelConfig

# In memory -> on disk. {rest} stands for anything, {k} for a number, {layer} for the layer an MTP module is on disk.
DECODER = {
    "lm_head.weight": "lm_head.weight",
    "{rest}": "model.{rest}",
}
MTP = {
    "mtp.{k}.norm.weight": "model.layers.{layer}.shared_head.norm.weight",
    "mtp.{k}.block.{rest}": "model.layers.{layer}.{rest}",
    "mtp.{k}.{rest}": "model.layers.{layer}.{rest}",
}
FAMILIES = {
    "llama": DECODER,
    "deepseek_v2": MTP | DECODER,
    "deepseek_v3": MTP | DECODER,
}
# A fused stack over experts {e} -> its parts on disk, in the order of their rows.
EXPERTS = {
    "experts.gate_up_proj": ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight"),
    "experts.down_proj": ("experts.{e}.down_proj.weight",),
}
# llama.cpp's names for the llama family; {n} is the layer.
GGUF_LLAMA = {
    "token_embd.{kind}": "embed_tokens.{kind}",
    "output_norm.{kind}": "norm.{kind}",
    "output.{kind}": "lm_head.{kind}",
    "blk.{n}.attn_norm.{kind}": "layers.{n}.input_layernorm.{kind}",
    "blk.{n}.attn_q.{kind}": "layers.{n}.self_attn.q_proj.{kind}",
    "blk.{n}.attn_k.{kind}": "layers.{n}.self_attn.k_proj.{kind}",
    "blk.{n}.attn_v.{kind}": "layers.{n}.self_attn.v_proj.{kind}",
    "blk.{n}.attn_output.{kind}": "layers.{n}.self_attn.o_proj.{kind}",
    "blk.{n}.ffn_norm.{kind}": "layers.{n}.post_attention_layernorm.{kind}",
    "blk.{n}.ffn_gate.{kind}": "layers.{n}.mlp.gate_proj.{kind}",
    "blk.{n}.ffn_up.{kind}": "layers.{n}.mlp.up_proj.{kind}",
    "blk.{n}.ffn_down.{kind}": "layers.{n}.mlp.down_proj.{kind}",
}
_FIELDS = {"rest": ".+", "k": r"\d+", "n": r"\d+", "kind": "weight|bias"}


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a parameter that one tensor on disk fills: all of it, or expert `index`'s rows."""

    name: str
    index: tuple[int | slice, ...] = ()


def translate(name: str, table: Mapping[str, str], **values: object) -> str | None:
    """`name` by the first pattern of `table` that fits it; None when none does."""
    for pattern, target in table.items():
        expression = re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(pattern))
        match = re.fullmatch(expression, name)
        if match is not None:
            return target.format(**match.groupdict(), **values)
    return None


def hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Place]:
    """Every tensor of a Hugging Face folder for a model with this `state` (its state_dict), and where it belongs."""
    places: dict[str, Place] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = re.match(r"mtp\.(\d+)", name)
        layer = config.num_hidden_layers + int(module[1]) if module else None
        on_disk = translate(name, FAMILIES[config.model_type], layer=layer)
        assert on_disk is not None
        places.update(_parts(on_disk, name, tensor))
    return places


def gguf_llama(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Place]:
    """Every tensor of a llama model's GGUF file, and where it belongs."""
    to_gguf = {ours: theirs for theirs, ours in GGUF_LLAMA.items()}
    places: dict[str, Place] = {}
    for name in state:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = translate(name, to_gguf)
        assert theirs is not None
        places[theirs] = Place(name)
    return places


def _parts(on_disk: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Place]]:
    for stack, parts in EXPERTS.items():
        if on_disk.endswith(stack):
            rows = tensor.shape[1] // len(parts)
            for expert in range(tensor.shape[0]):
                for number, part in enumerate(parts):
                    index = (expert, slice(number * rows, (number + 1) * rows))
                    yield on_disk.removesuffix(stack) + part.format(e=expert), Place(name, index)
            return
    yield on_disk, Place(name)


def is_copy(name: str, config: ModelConfig) -> bool:
    """Whether a tensor in a published folder repeats what stands elsewhere, or belongs to an MTP layer left out.

    DeepSeek's MTP layers carry copies of embedding and head; old Llama files store rotary frequencies; files of tied
    models may repeat the embedding as the head. Where config.json counts fewer MTP layers than the files hold, the
    further ones are meant to be skipped.
    """
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if match is None or int(match[1]) < config.num_hidden_layers:
        return False
    beyond = int(match[1]) >= config.num_hidden_layers + config.num_nextn_predict_layers
    return beyond or match[2] in ("embed_tokens.weight", "shared_head.head.weight")
