"""Publishing: a reader finds the old or the new, whole, whatever happens in between."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luciola.run import atomic_write, publish_folder, recover_folder


def publish(path: Path, text: str) -> None:
    with publish_folder(path) as folder:
        (folder / "config.json").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text(text)


def content(path: Path) -> str:
    text = (path / "config.json").read_text()
    assert (path / "sub" / "more").read_text() == text
    return text


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_folder_is_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    publish(target, "old")
    publish(target, "new")
    assert content(target) == "new"
    assert names(target.parent) == ["model"]


def test_a_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    publish(target, "old")
    with pytest.raises(RuntimeError), publish_folder(target) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError
    assert content(target) == "old"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("which", range(4))
def test_a_failing_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, which: int
) -> None:
    target = tmp_path / "model"
    publish(target, "old")
    real, count = getattr(os, call), iter(range(1000))

    def failing(*arguments: object) -> object:
        if next(count) == which:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            publish(target, "new")
        except OSError as failure:
            assert failure.errno == errno.ENOSPC
            assert content(target) == "old"
        else:
            assert call == "rename", "only a rename has fewer calls than we fail"
            assert which >= 2
            assert content(target) == "new"
    assert names(tmp_path) == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for 256 KiB: a real one where we may mount, otherwise an os.fsync that counts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    real = os.fsync

    def counting(descriptor: int) -> None:
        if sum(file.stat().st_size for file in disk.rglob("*") if file.is_file()) > 256 << 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    yield disk


def test_a_full_disk_leaves_what_was_there_and_room_to_go_on(small_disk: Path) -> None:
    publish(small_disk / "model", "old")
    atomic_write(small_disk / "file", "old")
    big = "x" * (400 << 10)
    with pytest.raises(OSError) as failure:
        publish(small_disk / "model", big)
    assert failure.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        atomic_write(small_disk / "file", big)
    assert names(small_disk) == ["file", "model"]
    assert content(small_disk / "model") == (small_disk / "file").read_text() == "old"
    publish(small_disk / "model", "new")
    assert content(small_disk / "model") == "new"


KILLED = """
import os, signal, sys
from pathlib import Path
from luciola.run import publish_folder
calls, victim, place = 0, sys.argv[2], int(sys.argv[3])
def deadly(name):
    real = getattr(os, name)
    def call(*arguments):
        global calls
        if name == victim:
            if calls == place:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
        return real(*arguments)
    setattr(os, name, call)
deadly("rename"); deadly("fsync")
with publish_folder(Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "more").write_text("new")
"""


@pytest.mark.parametrize(
    ("victim", "place", "expected"),
    [("fsync", 0, "old"), ("rename", 0, "old"), ("rename", 1, "new"), ("fsync", 4, "new")],
    ids=["while flushing", "before moving the old aside", "between the two renames", "before deleting the old"],
)
def test_a_killed_process_leaves_a_folder_that_recovers(tmp_path: Path, victim: str, place: int, expected: str) -> None:
    target = tmp_path / "model"
    publish(target, "old")
    process = subprocess.run([sys.executable, "-c", KILLED, str(target), victim, str(place)])
    assert process.returncode == -9
    recover_folder(target)
    assert content(target) == expected
    recover_folder(target)
    assert content(target) == expected
    publish(target, "newer")
    assert content(target) == "newer"
    assert names(tmp_path) == ["model"]


def test_a_folder_with_foreign_files_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis holds chapter1.tex.*choose an empty or a new folder"):
        publish(target, "new")
    assert names(target) == ["chapter1.tex"]
    (target / "chapter1.tex").rename(target / "model-00001-of-00002.safetensors")
    publish(target, "new")
    assert names(target) == ["config.json", "sub"], "an old shard goes"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match="is a file where a folder is to be written"):
        publish(tmp_path / "model", "new")


def test_a_link_keeps_pointing_to_the_folder(tmp_path: Path) -> None:
    publish(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    atomic_write(path, "öld")
    assert path.read_bytes() == "öld".encode()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        atomic_write(path, b"new")
    assert path.read_text() == "öld"
    assert names(path.parent) == ["file"]


def test_files_are_as_readable_as_the_user_wants_his_files_to_be(tmp_path: Path) -> None:
    """Some writers (safetensors) give the owner alone the right to read."""
    before = os.umask(0o022)
    try:
        with publish_folder(tmp_path / "model") as folder:
            (folder / "secretive").write_text("x")
            (folder / "secretive").chmod(0o600)
            (folder / "usual").write_text("x")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {0o644}
