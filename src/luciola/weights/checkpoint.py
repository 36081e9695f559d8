"""A model file opened: what it holds and where that belongs, known from headers alone; tensors are read when asked for.

A wrong or damaged file is found out from names and shapes before anything of its size is allocated or read. Then one
tensor after the other goes straight to its place, so that loading needs the memory of the model and of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from luciola.model.config import ModelConfig
from luciola.model.quant import Quantized
from luciola.model.transformer import Transformer
from luciola.text.tokenizer import Tokenizer
from luciola.weights.parts import Place, Shape, put

_TENSORS_OF_A_LAYER = 4  # a layer has nine or more; a file with so few is not worth building anything for


class Placement(Protocol):
    """Every tensor of a file for a model whose parameters have these shapes; `present` are the names in the file."""

    def __call__(
        self, config: ModelConfig, shapes: Mapping[str, Shape], present: Container[str] = ...
    ) -> dict[str, Place]: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor lies in its file: its shape, the file format's name for its kind of number, and its bytes."""

    shape: Shape
    kind: str
    nbytes: int


@dataclass
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder or file.
        format: "hf" or "gguf".
        config: the model's ModelConfig.
        stored: every tensor that belongs to the model, by its name in the file.
        placement: the rule that says where each belongs.
        read: fetches one tensor, dequantised.
        load_tokenizer: reads the tokenizer; gives None where there is none.
        blocks: fetches one tensor as it is quantised; gives None where it is not in 8 or 4 bits.
        changes: what adapters do to the float32 values of some parameters once they are read.
        shapes: of every parameter and buffer in memory.
        places: where each stored tensor belongs.
        parts: the stored tensors that make up each parameter; a tied head has none.

    Raises:
        ValueError: naming tensors that are missing, that have no place, or whose shape is not the parameter's.
    """

    path: Path
    format: str
    config: ModelConfig
    stored: Mapping[str, Stored]
    placement: Placement
    read: Callable[[str], Tensor]
    load_tokenizer: Callable[[], Tokenizer | None]
    blocks: Callable[[str], Quantized | None] = lambda name: None
    changes: Mapping[str, Sequence[Callable[[Tensor], None]]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(init=False)
    places: dict[str, Place] = field(init=False)
    parts: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        layers = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        if layers * _TENSORS_OF_A_LAYER > len(self.stored):
            raise ValueError(
                f"{self.path}: {layers} layers are announced and only {len(self.stored)} tensors are there."
            )
        self.shapes = outline(self.config, self.path)
        self.places = self.placement(self.config, self.shapes, self.stored)
        self._check()
        self.parts = {}
        for name, place in self.places.items():
            self.parts.setdefault(place.name, []).append(name)

    def _check(self) -> None:
        problems = [f"{name} is missing" for name in self.places if name not in self.stored]
        problems += [f"{name} has no place in this model" for name in self.stored if name not in self.places]
        for name, place in self.places.items():
            if name in self.stored and self.stored[name].shape != place.shape:
                found = list(self.stored[name].shape)
                problems.append(f"{name} should have shape {list(place.shape)} and has {found}")
        if problems:
            shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
            raise ValueError(f"{self.path}: The tensors do not fit the configuration: {shown}.")

    def fill(self, name: str, parameter: Tensor) -> None:
        """Read the parameter `name` into `parameter`, which has its shape, converting to its dtype and device."""
        if name in self.changes and parameter.dtype not in (torch.float32, torch.float64):
            whole = torch.empty(self.shapes[name])  # what is added would be lost to rounding twice
            self.fill(name, whole)
            parameter.copy_(self._within(torch.finfo(parameter.dtype), name, whole))
            return
        for part in self.parts[name]:
            put(parameter, self.places[part], self._within(torch.finfo(parameter.dtype), part, self.read(part)))
        for change in self.changes.get(name, ()):
            change(parameter)

    def _within(self, numbers: torch.finfo, name: str, tensor: Tensor) -> Tensor:
        low, high = torch.aminmax(tensor)  # which NaN passes through; isfinite would need the tensor's memory again
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{self.path} is damaged: tensor {name} holds values that are not finite; fetch it again.")
        if max(float(high), -float(low)) > numbers.max:
            raise ValueError(
                f"{self.path}: tensor {name} has values beyond {numbers.max:g}, the most that {numbers.dtype} can "
                "hold; use bfloat16 or float32."
            )
        return tensor

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter `name` in memory's form."""
        values = torch.empty(self.shapes[name], dtype=dtype)
        self.fill(name, values)
        return values

    def model(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Transformer:
        """The Transformer with its weights in `dtype` (None: float32); router biases stay float32."""
        with torch.device(device or "cpu"), Blank(dtype or torch.float32):
            model = Transformer(self.config)
        with torch.no_grad():
            for name, parameter in model.state_dict().items():
                if name in self.parts:
                    self.fill(name, parameter)
        return model


def outline(config: ModelConfig, where: object) -> dict[str, Shape]:
    """The shape of every parameter and buffer of a model, of which nothing is allocated.

    Raises:
        ValueError: the sizes are beyond what any tensor can have.
    """
    try:
        with torch.device("meta"), Blank(torch.float32):
            return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: a model of the announced sizes cannot be built: {reason}") from error


def config_from(data: Mapping[str, Any], where: object) -> ModelConfig:
    """ModelConfig.from_hf with errors of one sentence that begins with `where`, the file."""
    try:
        return ModelConfig.from_hf(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = "is not a field that is known here; if it does not change what is computed, take it out"
        message = f"{field_name}: {reason}" if field_name else reason
        raise ValueError(f"{where} does not describe a model this version can build: {message}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


class Blank(TorchFunctionMode):
    """Modules built under it have parameters of `dtype` whose memory is not touched: it is overwritten anyway."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (torch.empty, torch.ones) and kwargs.get("dtype") is None:
            kwargs["dtype"] = self._dtype
        return func(*args, **kwargs)
