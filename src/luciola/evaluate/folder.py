"""The folder of an evaluation: what was asked for, what was written, and the figures. It goes on where it was killed.

FOLDER/
  settings.json    model, tasks, sampling: another evaluation is refused here
  TASK.jsonl       a judged problem a line, written as it comes
  results.json     the figures by task          samples.html     completions to read in a browser
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luciola.evaluate.page import page
from luciola.evaluate.run import Evaluation
from luciola.run import atomic_write
from luciola.run.compare import flat

SAMPLED = 256  # numbers of a tensor that its fingerprint looks at


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or check that what it holds was begun with these settings.

    Raises:
        ValueError: it was begun with others, and the sentence names those that differ; or what it holds is damaged.
    """
    file, ours = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(ours, indent=2) + "\n")
        return
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise ValueError(
            f"{file} is damaged: it holds no JSON object, so what {folder} was begun with is not known; delete the "
            "folder or give another --output"
        )
    there, here = _by_key(theirs, ours), _by_key(ours, theirs)
    changed = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
    if changed:
        listed = ", ".join(f"{name} = {there.get(name)} there, {here.get(name)} here" for name in sorted(changed))
        raise ValueError(f"{folder} holds an evaluation with other settings ({listed}); give another --output")


def _by_key(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by dotted key; of the tasks the names alone where those of `others` have other names."""
    tasks, theirs = (dict(each.get("tasks") or {}) for each in (settings, others))
    return flat(settings if tasks.keys() == theirs.keys() else {**settings, "tasks": ", ".join(tasks)})


def finish(folder: Path, title: str, results: Mapping[str, Evaluation]) -> None:
    """Write results.json and samples.html."""
    figures = {name: result.figures for name, result in results.items()}
    atomic_write(folder / "results.json", json.dumps(figures, indent=2) + "\n")
    html = page(title, {name: (result.figures, result.judged) for name, result in results.items()})
    atomic_write(folder / "samples.html", html.encode(errors="replace"))  # a lone surrogate of a completion


def fingerprint(model: nn.Module) -> str:
    """A digest of some of the numbers of every tensor: any step of training changes it, and it takes no time."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:SAMPLED].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
