"""`Run`: one run's folder, locked while it is written.

runs/NAME/
  recipe.toml        every setting, defaults included
  environment.json   versions, commit, machine, the dtype chosen
  metrics.jsonl      an object a step          samples.jsonl    completions to read
  curves.png         the metrics drawn         summary.json     the final table: its presence says that the run ended
  checkpoints/       step-000050/ ...          model/           the result, in Hugging Face layout
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from luciola.recipe import Recipe, check, read_toml, to_toml
from luciola.run import curves
from luciola.run.compare import differences
from luciola.run.environment import environment
from luciola.run.progress import Advance, progress
from luciola.run.publish import atomic_write, publish_folder, recover_folder
from luciola.run.records import RecordFile, read_records

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# What must stay the same for a resumed run to repeat the steps it would have made (bit for bit).
WATCHED = ("luciola", "torch", "cpu", "threads")


class Run:
    """An open run folder, made by `Run.create`; closing it, or leaving its `with` block, gives it free."""

    def __init__(self, path: Path, recipe: Recipe, kind: str, dtype: str, lock: int) -> None:
        self.path = path
        self.recipe = recipe
        self.kind = kind
        self.dtype = dtype  # "float32" or "bfloat16": what recipe.dtype came to here; a resumed run keeps it
        self._lock: int | None = lock
        self._metrics = RecordFile(path / "metrics.jsonl")
        self._samples = RecordFile(path / "samples.jsonl")
        self._writer: SummaryWriter | None = None
        if recipe.run.tensorboard:
            self._writer = _tensorboard(path / "tensorboard")

    @classmethod
    def create(cls, recipe: Recipe, kind: str, resume: bool = False) -> Self:
        """Makes the folder of a new run, or with `resume` opens the one that is there (or makes it, if none is).

        A run that failed before its first step, for want of a file say, holds nothing to keep and begins anew.

        Raises ValueError if the run exists and `resume` is not asked for, if it was started with other settings (only
        those of [run] may differ), or if another process is writing it.
        """
        path = Path(recipe.run.folder, recipe.run.name)
        path.mkdir(parents=True, exist_ok=True)
        stored = path / "recipe.toml"
        lock = _locked(path)
        try:
            kept = stored.exists() and _has_begun(path)
            if kept and not resume:
                if _is_finished(path):
                    raise ValueError(f"the run {path} has finished (luciola chat {path}); choose another run.name=NAME")
                raise ValueError(f"the run {path} exists; continue it with --resume, or choose another run.name=NAME")
            if kept:
                refuse_other_settings(recipe)
                dtype = _reopen(path, recipe)
            else:
                dtype = _start(path, recipe, kind)
            recover_folder(path / "model")
            return cls(path, recipe, kind, dtype, lock)
        except BaseException:
            _release(lock)
            raise

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end: nothing is left to do."""
        return _is_finished(self.path)

    @property
    def model_folder(self) -> Path:
        """Where the finished model belongs."""
        return self.path / "model"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics of a step to metrics.jsonl."""
        self._metrics.append(step, metrics)
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Appends completions of a step to samples.jsonl, each a table such as prompt, completion, verdict, reward."""
        for sample in samples:
            self._samples.append(step, sample)

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged so far."""
        return read_records(self.path / "metrics.jsonl") if (self.path / "metrics.jsonl").exists() else []

    def truncate(self, step: int) -> None:
        """Forgets metrics and samples after `step`: a resumed run logs those steps again."""
        self._metrics.truncate(step)
        self._samples.truncate(step)

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yields a folder to fill, published as checkpoints/step-000050; then only the newest few are kept."""
        self._metrics.sync()
        self._samples.sync()
        with publish_folder(self.path / "checkpoints" / f"step-{step:06}", vanishing=("*",)) as folder:
            yield folder
        for _, outdated in self.checkpoints()[: -self.recipe.run.keep_checkpoints]:
            shutil.rmtree(outdated)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The complete checkpoints, as (step, folder), oldest first."""
        folders = (self.path / "checkpoints").glob("step-*")
        return sorted((int(folder.name.removeprefix("step-")), folder) for folder in folders)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, the final table. Its presence says that the run came to its end."""
        atomic_write(self.path / "summary.json", json.dumps(values, indent=2) + "\n")

    def plot(self) -> None:
        """Draws curves.png from the metrics so far, those of the pre-training in base/ and the summary."""
        base, summary = self.path / "base" / "metrics.jsonl", self.path / "summary.json"
        curves.draw(
            self.metrics(),
            self.path / "curves.png",
            title=self.recipe.run.name,
            base=read_records(base) if base.exists() else (),
            summary=json.loads(summary.read_text()) if summary.exists() else None,
        )

    def progress(self, total: int, description: str, start: int = 0) -> AbstractContextManager[Advance]:
        """A progress bar on a terminal, lines elsewhere (see `luciola.run.progress`)."""
        return progress(total, description, start)

    def close(self) -> None:
        """Closes the files and gives the folder free; may be called twice."""
        self._metrics.close()
        self._samples.close()
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            _release(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_finished(path: Path) -> bool:
    return (path / "summary.json").exists()


def _has_begun(path: Path) -> bool:
    """Whether a run holds anything beyond its settings: a step, an evaluation, or a base that has."""
    if any((path / name).exists() for name in ("metrics.jsonl", "checkpoints", "before.json", "summary.json", "model")):
        return True
    return (path / "base" / "recipe.toml").exists() and _has_begun(path / "base")


def _start(path: Path, recipe: Recipe, kind: str) -> str:
    # recipe.toml comes last: it is what makes the folder a run.
    facts = environment(kind, recipe.dtype)
    atomic_write(path / "environment.json", json.dumps(facts, indent=2) + "\n")
    atomic_write(path / "recipe.toml", to_toml(_rooted(recipe)))
    return str(facts["dtype"])


def _reopen(path: Path, recipe: Recipe) -> str:
    facts = json.loads((path / "environment.json").read_text())
    if _is_finished(path):
        return str(facts["dtype"])  # only to be looked at
    now = environment(facts["kind"], facts["dtype"])
    for name in WATCHED:
        if now[name] != facts[name]:
            print(
                f"warning: {path} was started with {name} {facts[name]} and goes on with {now[name]}: "
                "its numbers may differ in the last bits from a run that never stopped",
                file=sys.stderr,
            )
    facts["resumed"] = [*facts.get("resumed", []), {"at": now["started"]} | {name: now[name] for name in WATCHED}]
    atomic_write(path / "environment.json", json.dumps(facts, indent=2) + "\n")
    atomic_write(path / "recipe.toml", to_toml(_rooted(recipe)))
    return str(facts["dtype"])


def refuse_other_settings(recipe: Recipe) -> None:
    """ValueError where the recipe's run has begun with other settings; those of [run] may differ."""
    stored = Path(recipe.run.folder, recipe.run.name, "recipe.toml")
    if not stored.exists() or not _has_begun(stored.parent):
        return
    before = check(type(recipe), read_toml(stored), where=str(stored))
    changed = [
        (key, theirs, ours)
        for key, theirs, ours in differences(before, recipe)
        if not key.startswith("run.") and not (key == "model.path" and _same_place(theirs, ours))
    ]
    if changed:
        listed = ", ".join(f"{key} = {ours} instead of {theirs}" for key, theirs, ours in changed)
        raise ValueError(
            f"{stored.parent} was started with other settings ({listed}); resume it with its own, or start another run "
            "with run.name=NAME"
        )


def _rooted(recipe: Recipe) -> Recipe:
    """The recipe with the whole path of the model that it starts from, which is then found from any folder."""
    model = getattr(recipe, "model", None)
    if model is None or model.path is None:
        return recipe
    path = os.path.expanduser(model.path)
    if not os.path.exists(path):  # an installed package's, or missing
        return recipe
    return recipe.model_copy(update={"model": model.model_copy(update={"path": os.path.abspath(path)})})


def _same_place(stored: str | None, given: str | None) -> bool:
    """Whether a path that a recipe gives is the stored one; the folder in which both begin may have moved since."""
    if stored is None or given is None:
        return False
    given = os.path.normpath(os.path.expanduser(given))
    return Path(stored).parts[-len(Path(given).parts) :] == Path(given).parts or stored == os.path.abspath(given)


# A run is locked through an open file, so that the lock ends with the process however that ends. A forked child would
# hold it on, even after its parent was killed, and therefore closes the file first thing.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


ORPHAN_SECONDS = 1.0  # for the child of a process just killed to come to its first thing, on a busy machine


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _locked(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode().strip()
            if _lives(owner) or time.monotonic() > deadline:
                os.close(descriptor)
                raise ValueError(
                    f"process {owner or '(unknown)'} is writing the run {path}; wait for it, or choose another "
                    "run.name=NAME"
                ) from None
            time.sleep(0.01)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    _held.add(descriptor)
    return descriptor


def _release(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _tensorboard(folder: Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("run.tensorboard = true needs an extra: pip install 'luciola[tensorboard]'") from None
    return SummaryWriter(str(folder))
