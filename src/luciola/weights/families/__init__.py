"""One file per model family: the class that runs it elsewhere, what its configuration leaves unsaid, and where each
parameter stands in a file.

The tables map names in memory to names in a file and are read in both directions. A parameter's name in memory is the
name Hugging Face gives it without the leading "model."; a multi-token prediction module is the layer after the last.
{rest} stands for anything, {n} for a layer, {e} for an expert. Square brackets name the part of a parameter that one
tensor in the file holds (`weights/parts.py`), where file and memory cut it differently.

To add a family, add a file beside these with a `FAMILY` in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a family apart, beyond the sizes in its configuration.

    Attributes:
        model_type, architecture: Hugging Face's names for the family and for the class that runs it.
        hugging_face: where each parameter stands in a Hugging Face folder.
        gguf_architecture, gguf: llama.cpp's name for the family, and where each parameter stands in a GGUF file.
        gguf_older: how older GGUF files store some parameters; read, never written.
        defaults: values of fields that a config.json may leave out.
        read: changes the content of a config.json in place, where a family means something else by it.
        qkv_bias, output_bias: whether the attention projections have biases; None: as `attention_bias` says.
        qk_norm: whether queries and keys are normalised head by head before they are rotated.
        latent, experts: whether it may have latent attention, and routed experts.
        stated: fields that its config.json must not leave out, since others take something else than ours then.
        mlp_bias: whether the feed-forward may have biases.
        windows: whether attention may be limited to the last `sliding_window` tokens.
    """

    model_type: str
    architecture: str
    hugging_face: Mapping[str, str]
    gguf_architecture: str
    gguf: Mapping[str, str]
    gguf_older: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[dict[str, Any]], None] = lambda data: None
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    latent: bool = False
    experts: bool = False
    stated: tuple[str, ...] = ()
    mlp_bias: bool = False
    windows: bool = False


def _all() -> dict[str, Family]:
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in families}


FAMILIES = _all()
