"""Where each parameter of a Transformer stands in a file, by the tables in `families/`."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from functools import cache

from luciola.model.config import ModelConfig
from luciola.weights.families import FAMILIES
from luciola.weights.parts import Place, Shape, places_of

_FIELDS = {"rest": ".+", "n": r"\d+"}


def hugging_face(config: ModelConfig, shapes: Mapping[str, Shape], present: Container[str] = ()) -> dict[str, Place]:
    """Every tensor of a Hugging Face folder for a model whose parameters have these `shapes`, and where it belongs."""
    return _places(config, shapes, FAMILIES[config.model_type].hugging_face)


def gguf(config: ModelConfig, shapes: Mapping[str, Shape], present: Container[str] = ()) -> dict[str, Place]:
    """The same for a GGUF file; a parameter is stored the older way where its older name is among those `present`."""
    family = FAMILIES[config.model_type]
    places = _places(config, shapes, family.gguf)
    for name, place in _places(config, shapes, family.gguf_older, partial=True).items():
        if name in present:
            places = {theirs: other for theirs, other in places.items() if other.name != place.name}
            places[name] = place
    return places


def _places(
    config: ModelConfig, shapes: Mapping[str, Shape], table: Mapping[str, str], partial: bool = False
) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        entries = list(_entries(as_layer(name, config.num_hidden_layers), table))
        if not entries and not partial:
            raise ValueError(f"{name} has no place in this format's files of {config.model_type} models.")
        for part, target in entries:
            places.update((target.format(**numbers), place) for numbers, place in places_of(part, name, shape, config))
    return places


def as_layer(name: str, layers: int) -> str:
    """A parameter of multi-token prediction module k as one of the k-th layer after the last: "layers.61.enorm.weight".

    Its block's parameters are named like any other layer's, its norm before the shared head "shared_head.norm".
    """
    match = re.match(r"mtp\.(\d+)\.(block\.)?(.*)", name)
    if match is None:
        return name
    rest = match[3] if match[2] or not match[3].startswith("norm.") else f"shared_head.{match[3]}"
    return f"layers.{layers + int(match[1])}.{rest}"


def _entries(name: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The entries of `table` for a parameter: the first whose name fits, and all others with that same name."""
    first = None
    for pattern, target in table.items():
        base, _, part = pattern.removesuffix("]").partition("[")
        match = _expression(base).fullmatch(name) if first in (None, base) else None
        if match is not None:
            first = base
            yield part, re.sub(r"{(rest|n)}", lambda field, match=match: match[field[1]], target)  # type: ignore[misc]


@cache
def _expression(base: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(base)))


def is_copy(name: str, config: ModelConfig, present: Container[str]) -> bool:
    """Whether a tensor in a published file repeats what stands elsewhere, or belongs to an MTP layer left out.

    DeepSeek's MTP layers carry copies of embedding and head; old Llama files store rotary frequencies; files of tied
    models may repeat the embedding as the head. Where the configuration counts fewer MTP layers than the file holds
    (an `eh_proj` among those `present` tells them), the further ones are meant to be skipped.
    """
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    match = re.match(r"((?:model\.layers|blk)\.(\d{1,9})\.(?:nextn\.)?)(.*)", name)
    if match is None or int(match[2]) < config.num_hidden_layers:
        return False
    layer = match[1].removesuffix("nextn.")
    is_mtp = f"{layer}eh_proj.weight" in present or f"{layer}nextn.eh_proj.weight" in present
    beyond = int(match[2]) >= config.num_hidden_layers + config.num_nextn_predict_layers
    copies = ("embed_tokens", "shared_head.head", "shared_head_head")
    return is_mtp and (beyond or match[3].removesuffix(".weight") in copies)
