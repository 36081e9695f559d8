"""From a configuration and named tensors to a Transformer: sizes first, then memory, then one tensor after the other.

A wrong or damaged file is found out from names and shapes alone, before anything of its size is allocated or read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer
from luciola.weights.names import Place

Placement = Callable[[ModelConfig, Mapping[str, Tensor]], dict[str, Place]]


def config_from(data: Mapping[str, Any], where: object) -> ModelConfig:
    """ModelConfig.from_hf with errors of one sentence that begins with `where`, the file."""
    try:
        return ModelConfig.from_hf(dict(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{field}: {reason}" if field else reason
        raise ValueError(f"{where} does not describe a model this version can build: {message}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def build(
    config: ModelConfig,
    dtype: torch.dtype | None,
    placement: Placement,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
) -> Transformer:
    """A Transformer with weights of `dtype` (None: float32); router biases, which are buffers, stay float32.

    `shapes` are those of the tensors on disk, `read` fetches one of them, `placement` tells where each belongs.

    Raises:
        ValueError: naming tensors that are missing, that have no place, or whose shape is not the parameter's.
    """
    if config.num_hidden_layers > len(shapes):
        raise ValueError(f"{config.num_hidden_layers} layers are announced and only {len(shapes)} tensors are there.")
    try:
        with torch.device("meta"), _NoInitialization():
            outline = Transformer(config).state_dict()
    except RuntimeError as error:
        raise ValueError(f"A model of the announced sizes cannot be built: {error}") from error
    _check(outline, placement(config, outline), shapes)

    with _NoInitialization():
        model = Transformer(config)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    state = model.state_dict()
    for name, place in placement(config, state).items():
        state[place.name][place.index].copy_(read(name))
    return model


def _check(outline: Mapping[str, Tensor], places: Mapping[str, Place], shapes: Mapping[str, Sequence[int]]) -> None:
    problems = [f"{name} is missing" for name in places if name not in shapes]
    problems += [f"{name} has no place in this model" for name in shapes if name not in places]
    for name, place in places.items():
        expected = list(outline[place.name][place.index].shape)
        if name in shapes and list(shapes[name]) != expected:
            problems.append(f"{name} should have shape {expected} and has {list(shapes[name])}")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ValueError(f"The tensors do not fit the configuration: {shown}.")


class _NoInitialization(TorchFunctionMode):
    """torch.nn.init's functions return the tensor as it is: random numbers that are overwritten cost seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
