"""Compiling the kernels: what is kept belongs to one way of compiling, and a compiler that hangs is named."""

from pathlib import Path

import pytest

from luciola.model.native import build

# Stands for a compiler: what it makes is its own arguments.
COMPILER = """#!/bin/sh
if [ "$*" = "${*%--version}" ]; then
    all="$*"
    while [ "$1" != "-o" ]; do shift; done
    echo "$all" > "$2"
else
    echo version 1
fi
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setattr("luciola.hardware.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("ctypes.CDLL", Path)
    monkeypatch.delenv("LUCIOLA_NATIVE", raising=False)
    return str(path)


def test_other_arguments_of_the_compiler_make_another_library(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for command in (compiler, f"{compiler} -O0", f"{compiler} -O0 -g", f"{compiler} -O0"):
        monkeypatch.setenv("CC", command)
        library, reason = build._found.__wrapped__()
        assert isinstance(library, Path), reason
        arguments = command.split()[1:]
        assert library.read_text().split()[: len(arguments) + 1] == [*arguments, build.FLAGS[0]]
        assert made.setdefault(command, library) == library, "compiled once"
    assert len(set(made.values())) == 3


def test_a_compiler_that_hangs_is_named_in_one_short_sentence(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(compiler).write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(build, "SECONDS", 0.2)
    monkeypatch.setenv("CC", compiler)
    assert build._found.__wrapped__() == (None, f"{compiler} did not finish within 0.2 seconds")
