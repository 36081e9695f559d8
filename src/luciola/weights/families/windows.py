"""How Qwen's configurations say which layers look back only `sliding_window` tokens."""

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(data: dict[str, Any]) -> None:
    """Bring use_sliding_window and max_window_layers into the one form of `layer_types`.

    Qwen's files state a sliding_window that use_sliding_window (false by default) then switches off; where it is on,
    layers from max_window_layers on have it, unless layer_types (transformers 5) lists them.
    """
    used = data.pop("use_sliding_window", False)
    first = data.pop("max_window_layers", 28)
    types = data.get("layer_types")
    if not isinstance(first, int) or not isinstance(types, list | None):
        raise ValueError("max_window_layers must be a number of layers, and layer_types a list with an entry for each")
    if used:
        data.setdefault("sliding_window", 4096)  # the oracle's default
    if not used or data.get("sliding_window") is None:
        data.pop("sliding_window", None)
        if types is not None and SLIDING not in types:
            del data["layer_types"]
    elif types is None and isinstance(data.get("num_hidden_layers"), int):
        layers = min(data["num_hidden_layers"], 100_000)
        data["layer_types"] = [FULL if layer < first else SLIDING for layer in range(layers)]
