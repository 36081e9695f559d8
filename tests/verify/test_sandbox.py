"""The sandbox: what a program sees, what it may use, and how its end is told."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luciola.verify import sandbox
from luciola.verify.sandbox import PYTHON, Outcome, Program, SandboxError, run

pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=sandbox.unavailable() or "")


def python(code: str, stdin: bytes = b"", **limits: float) -> Outcome:
    return run([*PYTHON, "-c", code], stdin, **limits)  # type: ignore[arg-type]


def test_output_input_and_exit_code() -> None:
    outcome = python("import sys; print(input()[::-1]); print('oh', file=sys.stderr); sys.exit(3)", b"abc\n")
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert (outcome.stdout, outcome.stderr) == (b"cba\n", b"oh\n")
    assert run(["true"]).status == "ok"
    assert run(["sh", "-c", "kill -9 $$"]).exit_code == 128 + 9


def test_every_limit_is_named() -> None:
    assert python("import time; time.sleep(60)", seconds=0.5).status == "timeout"
    assert python("while True: pass", seconds=0.5).status == "timeout"
    assert python("x = bytearray(200 << 20)", memory_mb=100).status == "failed"  # a MemoryError of its own
    flood = python("while True: print('x' * 10000)", seconds=20, output_mb=0.1)
    assert (flood.status, flood.exit_code, len(flood.stdout)) == ("output", None, int(0.1 * 2**20))
    several = "import os, time\nfor _ in range(4): os.fork()\nx = bytearray(os.urandom(1 << 20) * 20); time.sleep(20)"
    assert python(several, seconds=20, memory_mb=100).status == "memory"


def test_it_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "tell nobody")
    (tmp_path / "mine").write_text("mine")
    code = f"import os; print(os.path.exists({str(tmp_path / 'mine')!r}), sorted(os.environ), os.listdir('/tmp'))"
    said = python(code).stdout.decode()
    assert said.startswith("False")
    assert "SECRET" not in said and said.rstrip().endswith("[]")
    assert python("import luciola").status == "failed"
    assert python("import socket; socket.create_connection(('1.1.1.1', 53), 2)").status == "failed"
    assert python("open('/usr/bin/new', 'w')").status == "failed"
    assert python(f"import os; os.kill({os.getpid()}, 0)").status == "failed"


def test_files_are_given_and_none_remain() -> None:
    outcome = run(["sh", "-c", "cat note; echo more > other; ls"], files={"note": b"hello\n"})
    assert outcome.stdout == b"hello\nnote\nother\n"
    assert not Path("/tmp/other").exists()
    assert run(["ls"]).stdout == b""


def test_a_program_dies_with_its_with_block_and_stops_for_another_thread() -> None:
    with Program([*PYTHON, "-c", "import time; time.sleep(60)"], seconds=60) as program:
        process = program._process
    assert process.returncode is not None
    with Program(["sleep", "60"], seconds=60) as program:
        program.stop()
        start = time.monotonic()
        assert program.wait().status == "stopped"
        assert time.monotonic() - start < 10


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is known of this machine is found out anew, before and after."""
    for known in (sandbox.unavailable, sandbox._view):
        known.cache_clear()
    yield
    for known in (sandbox.unavailable, sandbox._view):
        known.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_bubblewrap_nothing_runs_and_the_mend_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("prlimit", "setpriv"):
        (tmp_path / name).symlink_to("/usr/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"bwrap is missing; install it .*apt-get install bubblewrap"):
        run(["/usr/bin/true"])


@pytest.mark.usefixtures("fresh")
def test_where_bubblewrap_cannot_work_its_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho No permissions to create new namespace >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert subprocess.run(["bwrap"], capture_output=True).returncode == 1
    with pytest.raises(SandboxError, match=r"cannot make one here \(No permissions .*allow user namespaces"):
        run(["true"])
