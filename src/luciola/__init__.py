"""Luciola builds reasoning language models the DeepSeek way, in one readable PyTorch stack.

    lm = luciola.load("path/to/a/model")
    engine = luciola.Engine(lm)
    engine.generate(["The capital of France is"], luciola.SamplingParams(max_tokens=8))

The public names are imported when first used, so that `import luciola`, and with it `luciola --help`, loads no torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luciola.engine.engine import Engine
    from luciola.engine.grammar import Grammar
    from luciola.engine.params import SamplingParams
    from luciola.engine.sequence import Completion
    from luciola.model.language_model import LanguageModel, load

_HOME = {
    "load": "luciola.model.language_model",
    "LanguageModel": "luciola.model.language_model",
    "Engine": "luciola.engine.engine",
    "SamplingParams": "luciola.engine.params",
    "Completion": "luciola.engine.sequence",
    "Grammar": "luciola.engine.grammar",
}

__all__ = ["Completion", "Engine", "Grammar", "LanguageModel", "SamplingParams", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("luciola")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'luciola' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
