"""A Transformer whose weights are about to be read from a file: built without the cost of random numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from luciola.model.config import ModelConfig
from luciola.model.transformer import Transformer


class _NoInitialization(TorchFunctionMode):
    """torch.nn.init's functions return the tensor as it is."""

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


def empty_transformer(config: ModelConfig, dtype: torch.dtype | None = None) -> Transformer:
    """A Transformer with undefined weights of `dtype` (None: float32). Buffers, such as router biases, stay float32."""
    with _NoInitialization():
        model = Transformer(config)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    return model
