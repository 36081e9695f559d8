"""Exact checkpoints: everything that decides what the next step does.

`checkpoints/step-000050/` holds `optimizer.safetensors` (float32 weights and both moments), `buffers.safetensors` (the
experts' biases), further named sets of tensors (GRPO's reference) and `state.json`. All randomness derives from (seed,
step, item), so nothing else needs saving. Of a run with adapters the weights and moments are theirs alone; `state.json`
then names the base, with a checksum of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luciola.run import Run
from luciola.train.optim import Optimizer


class Restored(NamedTuple):
    """Where a run goes on: the number of finished steps, the facts and the further tensors saved along."""

    step: int
    facts: dict[str, Any]
    extra: dict[str, dict[str, Tensor]]


def save(
    run: Run,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    facts: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the state after `step` finished steps; the run keeps the newest few.

    Raises OSError when the disk is full; earlier checkpoints are then untouched.
    """
    sets: dict[str, Mapping[str, Tensor]] = {
        "optimizer": optimizer.state(),
        "buffers": _buffers(model),
        **(extra or {}),
    }
    with run.checkpoint(step) as folder:
        for name, tensors in sets.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
        content = {"step": step, "facts": dict(facts or {})}
        if optimizer.lora is not None:
            content["base"] = {"path": optimizer.lora.base, "crc32": optimizer.lora.base_checksum}
        (folder / "state.json").write_text(json.dumps(content))


def restore(run: Run, model: nn.Module, optimizer: Optimizer) -> Restored:
    """Put model and optimiser back to the newest checkpoint, if there is one, and forget what was logged after it."""
    checkpoints = run.checkpoints()
    if not checkpoints:
        run.truncate(0)
        return Restored(0, {}, {})
    step, folder = checkpoints[-1]
    try:
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        content = json.loads((folder / "state.json").read_text())
        facts = content["facts"]
        base = content["base"] if optimizer.lora is not None else {}
        optimizer.restore(tensors.pop("optimizer"))
        saved = tensors.pop("buffers")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        before = f"from {checkpoints[-2][1]}" if len(checkpoints) > 1 else "from the start"
        raise ValueError(
            f"the checkpoint {folder} is damaged ({error}); delete it, and --resume goes on {before}"
        ) from error
    if optimizer.lora is not None and base["crc32"] != optimizer.lora.base_checksum:
        raise ValueError(
            f"the base model {base['path']} is not the one that the adapters in {folder} were trained on; put that "
            "back, or start another run with run.name=NAME"
        )
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in saved.items():
            buffers[name].copy_(tensor)
    run.truncate(step)
    return Restored(step, facts, tensors)


def last_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint's folder."""
    checkpoints = run.checkpoints()
    return checkpoints[-1][1] if checkpoints else None


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}
