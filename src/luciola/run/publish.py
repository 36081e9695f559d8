"""Publishing files and folders so that a reader, or a run that was killed, only ever finds whole ones.

Everything is written beside its place, flushed to the disk and renamed into it; a name that starts with a dot is not
finished. One writer at a time: a run folder is protected by its lock, other folders by whoever calls.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

# Files of a model folder that a new version may lack (fewer shards, no tokenizer) and that then vanish with the old.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "additional_chat_templates",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Writes a file (text as UTF-8) that is there as a whole or, on any failure, still is what it was."""
    with publish_file(path) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def publish_file(path: str | Path) -> Iterator[Path]:
    """Yields the name of a file to write, which takes the place of `path` when the block ends well, else vanishes."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    try:
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def publish_folder(path: str | Path, vanishing: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """Yields an empty folder to fill, which takes the place of `path` when the block ends well.

    If the block or the disk fails, what was at `path` stays and the new files are removed. A process killed in between
    leaves a folder that `recover_folder` mends, and so does the next `publish_folder`. An existing folder is replaced
    only when it holds nothing foreign: ValueError if the new one lacks some of its files, other than those whose names
    match `vanishing`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file where a folder is to be written; choose another name")
    recover_folder(path)
    new, old = _beside(path)
    for leftover in (new, old):  # of a process that was killed: unfinished the one, superseded the other
        if leftover.exists():
            shutil.rmtree(leftover)
    new.mkdir(parents=True)
    try:
        yield new
        _refuse_foreign(path, new, vanishing)
        readers = new.stat().st_mode & 0o666  # a folder follows the user's umask; safetensors' files do not
        for folder, _, files in os.walk(new):
            for name in files:
                os.chmod(Path(folder, name), readers)
                _flush(Path(folder, name))
            _flush(Path(folder))
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Brings `path` back after a `publish_folder` that was killed while neither folder stood there; else does nothing.

    The old folder is moved aside only once the new one is complete, which therefore takes its place.
    """
    path = Path(os.path.realpath(path))
    new, old = _beside(path)
    if old.exists() and not path.exists():
        os.rename(new if new.exists() else old, path)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")


def is_of_model(path: Path, patterns: Sequence[str] = MODEL_FILES) -> bool:
    """Whether a file is one of those that make up a model folder."""
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _refuse_foreign(path: Path, new: Path, vanishing: Sequence[str]) -> None:
    if not path.exists():
        return
    foreign = sorted(
        entry.name for entry in path.iterdir() if not (new / entry.name).exists() and not is_of_model(entry, vanishing)
    )
    if foreign:
        raise ValueError(
            f"{path} holds {foreign[0]}, which replacing the folder would delete; choose an empty or a new folder"
        )


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
