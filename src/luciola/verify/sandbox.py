"""Run a program that nobody has read, in bubblewrap: what it can see, what it can use, and how it ends.

It sees /usr and Python's standard library, read-only, and a /tmp of its own in memory that nobody else sees: no
network, no files of this machine's people, no other processes, no /proc, none of our environment. What it can use:

| what                | limit                                                                                      |
| ------------------- | ------------------------------------------------------------------------------------------ |
| time                | `seconds` on the wall, and as many of processor time for each process                      |
| memory              | `memory_mb` of address space for a process, and of resident memory for all of them         |
| processes           | 32, threads counted                                                                        |
| disk                | /tmp holds 64 MB; a file 32 MB                                                             |
| output              | `output_mb` on each of stdout and stderr                                                   |
| system calls        | not those of `syscalls.py`                                                                 |

The program's processes live in a namespace whose first process is bubblewrap's. That one dies with us and takes all
others along, so nothing survives the end, daemons included; and as files only exist in memory, nothing is left behind.
"""

import functools
import itertools
import json
import math
import os
import select
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from luciola.verify.syscalls import seccomp_filter, supported

PYTHON = (os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-S", "-s", "-P", "-B")
PROCESSES = 32
TMP_MB, FILE_MB = 64, 32
_LOOK = 0.05  # seconds between two looks at the memory in use
Status = Literal["ok", "failed", "timeout", "memory", "output", "stopped"]
_CPU_LIMIT_EXIT = 128 + 24  # ended by SIGXCPU
_serial = itertools.count()


class SandboxError(OSError):
    """Programs cannot be run safely on this machine, or not now; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: "ok" with exit code 0, "failed" with another one, at the limit that is named, or "stopped".

    `exit_code` is 128 + n after signal n, and None where it was ended from outside. Output is cut at its limit.
    """

    status: Status
    stdout: bytes
    stderr: bytes
    exit_code: int | None
    seconds: float


def run(
    argv: Sequence[str],
    stdin: bytes = b"",
    seconds: float = 5,
    memory_mb: int = 512,
    output_mb: float = 1,
    files: Mapping[str, bytes] | None = None,
) -> Outcome:
    """Run a program to its end or to a limit; at the return it and all its processes are gone.

    Args:
        argv: the program, as seen inside, and its arguments; `PYTHON` begins a Python program's.
        stdin: what it reads; then it reads the end.
        seconds: wall time.
        memory_mb: MB of memory.
        output_mb: MB of output on each of stdout and stderr.
        files: contents by name, found executable in /tmp, which is also where the program starts.

    Raises:
        SandboxError: bubblewrap is not there or cannot work here.
    """
    with Program(argv, stdin, seconds, memory_mb, output_mb, files) as program:
        return program.wait()


class Program:
    """A program that has been started: `wait` for its end, or leave the `with` block and it is killed.

    Arguments as for `run`, except that `stdin` and `stdout` may be file descriptors, for programs that talk to one
    another, and `keep` names more descriptors that stay open inside. The thread that starts a program must outlive it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        stdin: bytes | int = b"",
        seconds: float = 5,
        memory_mb: int = 512,
        output_mb: float = 1,
        files: Mapping[str, bytes] | None = None,
        stdout: int = subprocess.PIPE,
        keep: Sequence[int] = (),
    ) -> None:
        if reason := unavailable():
            raise SandboxError(reason)
        self._seconds, self._memory_mb, self._output_bytes = seconds, memory_mb, int(output_mb * 2**20)
        with ExitStack() as ours:
            self._status, status = os.pipe()
            ours.callback(os.close, status)
            given = {name: ours.enter_context(_memory_file(content)) for name, content in (files or {}).items()}
            calls = ours.enter_context(_memory_file(seccomp_filter()))
            read = ours.enter_context(_memory_file(stdin)) if isinstance(stdin, bytes) else stdin
            copies = [["--perms", "0755", "--file", str(fd), f"/tmp/{name}"] for name, fd in given.items()]
            command = [
                *_view(),
                *itertools.chain.from_iterable(copies),
                *("--seccomp", str(calls), "--json-status-fd", str(status), "--chdir", "/tmp", "--"),
                *_as_nobody(_own_user()),
                *_limits(seconds, memory_mb),
                *argv,
            ]
            self._stdout, self._stderr, self._stopped = bytearray(), bytearray(), False
            self._began = time.monotonic()
            self._process = subprocess.Popen(
                command,
                stdin=read,
                stdout=stdout,
                stderr=subprocess.PIPE,
                pass_fds=(*given.values(), calls, status, *keep),
                env={},  # bubblewrap's own environment, which is not the program's, has no secrets either
                start_new_session=True,  # Ctrl-C reaches only us, and the program has no terminal to type into
            )

    def wait(self) -> Outcome:
        """The end of the program, at the latest at its time limit.

        Raises:
            SandboxError: bubblewrap could not set the program up.
        """
        try:
            limit = self._watch()
        finally:
            report = self.kill()
        code = report.get("exit-code")
        stdout, stderr = (bytes(text[: self._output_bytes]) for text in (self._stdout, self._stderr))
        status: Status
        if limit is not None:
            status = limit
        elif self._stopped:
            status = "stopped"
        elif code is None:
            said = stderr.decode(errors="replace").strip()
            raise SandboxError(f"the sandbox could not be set up: {said or 'bubblewrap was killed'}")
        else:
            status = "ok" if code == 0 else "timeout" if code == _CPU_LIMIT_EXIT else "failed"
        return Outcome(status, stdout, stderr, code if status in ("ok", "failed") else None, self._age())

    def stop(self) -> None:
        """Have another thread's `wait` return at once."""
        self._stopped = True
        self._process.kill()

    def _watch(self) -> Literal["timeout", "memory", "output"] | None:
        """Collect the output until the program ends (None) or meets a limit."""
        pipes = [
            (pipe.fileno(), text)
            for pipe, text in ((self._process.stdout, self._stdout), (self._process.stderr, self._stderr))
            if pipe is not None
        ]
        ended, next_look = os.pidfd_open(self._process.pid), _LOOK / 2
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(ended, selectors.EVENT_READ)
                for pipe, text in pipes:
                    os.set_blocking(pipe, False)
                    selector.register(pipe, selectors.EVENT_READ, text)
                running = True
                while running:
                    for key, _ in selector.select(max(0.0, min(self._seconds, next_look) - self._age())):
                        if key.data is None:
                            running = False
                        elif not _read(key.fd, key.data):
                            selector.unregister(key.fd)
                    if self._too_much_output():
                        return "output"
                    if running and self._age() >= self._seconds:
                        return "timeout"
                    if running and self._age() >= next_look:
                        next_look = self._age() + _LOOK
                        if _resident_bytes(self._process.pid) > self._memory_mb << 20:
                            return "memory"
        finally:
            os.close(ended)
        for pipe, text in pipes:  # what was written just before the end
            while _read(pipe, text) and not self._too_much_output():
                pass
        return "output" if self._too_much_output() else None

    def _age(self) -> float:
        return time.monotonic() - self._began

    def _too_much_output(self) -> bool:
        return max(len(self._stdout), len(self._stderr)) > self._output_bytes

    def kill(self) -> dict[str, int]:
        """End the program and wait until its last process is gone; what bubblewrap reported, above all "exit-code"."""
        if self._status < 0:
            return {}
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        os.set_blocking(self._status, False)
        said = bytearray()
        while _read(self._status, said):
            pass
        os.close(self._status)
        self._status = -1
        report: dict[str, int] = {}
        for line in said.splitlines():
            with suppress(ValueError):
                report |= json.loads(line)
        if "child-pid" in report:
            _await_end(report["child-pid"], kill="exit-code" not in report)
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _read(pipe: int, into: bytearray) -> bool:
    """Add what stands in a pipe; False where there is nothing now or there will be nothing any more."""
    try:
        piece = os.read(pipe, 1 << 16)
    except BlockingIOError:
        return False
    into += piece
    return bool(piece)


@functools.cache
def unavailable() -> str:
    """Why programs cannot be run safely on this machine, and the mend; "" where they can."""
    if not supported():
        return "model-written programs only run in a sandbox, which needs Linux on x86-64 or arm64"
    if missing := [name for name in ("bwrap", "prlimit", "setpriv") if shutil.which(name) is None]:
        return (
            f"model-written programs only run in a sandbox, and the program {missing[0]} is missing; install it "
            "(Debian, Ubuntu: apt-get install bubblewrap util-linux; Fedora: dnf install bubblewrap util-linux)"
        )
    trial = subprocess.run(
        [*_view(), "--", *_as_nobody(_own_user()), *_limits(5, 512), "true"], env={}, capture_output=True, text=True
    )
    if trial.returncode == 0:
        return ""
    return (
        f"model-written programs only run in a sandbox, and bubblewrap cannot make one here ({trial.stderr.strip()}); "
        "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu also "
        "kernel.apparmor_restrict_unprivileged_userns=0), or in a container run it with --privileged"
    )


@functools.cache
def _view() -> tuple[str, ...]:
    """bubblewrap with the file system that programs see."""
    prefix = os.path.realpath(sys.base_prefix)
    options = [
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *(("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if os.getuid() == 0 else ()),
        *(() if os.getuid() == 0 else ("--unshare-user",)),
        *("--die-with-parent", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"),
        *("--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONHASHSEED", "0"),  # the same verdict every time
        *("--ro-bind", "/usr", "/usr", "--tmpfs", "/usr/local"),
    ]
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        options += ["--symlink", os.readlink(name), name] if os.path.islink(name) else ["--ro-bind-try", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        options += ["--ro-bind-try", name, name]
    if prefix != "/usr":
        for folder in reversed(Path(prefix).parents[:-1]):  # which bubblewrap would make for its own user alone
            options += ["--perms", "0755", "--dir", str(folder)]
        options += ["--ro-bind", prefix, prefix]
    # Installed packages are hidden: some hold data sets, and with them the tests that a program should not know.
    for root, package_folder in itertools.product({prefix, "/usr"}, ("site-packages", "dist-packages")):
        for folder in sorted(Path(root).glob(f"lib*/python3*/{package_folder}")):
            options += ["--tmpfs", str(folder), "--remount-ro", str(folder)]
    options += ["--dev", "/dev", "--remount-ro", "/dev", "--perms", "1777", "--size", str(TMP_MB << 20)]
    options += ["--tmpfs", "/tmp", "--remount-ro", "/"]
    return (shutil.which("bwrap") or "bwrap", *options)


def _own_user() -> int:
    """A user number for one program. The kernel counts processes by user; of root it does not count them at all."""
    return 20_000 + (os.getpid() * 97 + next(_serial)) % 40_000


def _as_nobody(user: int) -> tuple[str, ...]:
    """Root gives up being root inside; for anyone else the user namespace has done so."""
    if os.getuid() != 0:
        return ()
    return ("setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "--")


def _limits(seconds: float, memory_mb: int) -> tuple[str, ...]:
    limits = {
        "as": memory_mb << 20,
        "cpu": max(1, math.ceil(seconds)),
        "nproc": PROCESSES,
        "fsize": FILE_MB << 20,
        "nofile": 128,
        "core": 0,
        "memlock": 0,
    }
    return ("prlimit", *(f"--{name}={limit}" for name, limit in limits.items()), "--")


def _resident_bytes(pid: int) -> int:
    """Memory in use by a process and all that descend from it."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        with suppress(OSError):
            total += int((folder / "statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in os.listdir(folder / "task"):
                waiting += map(int, (folder / "task" / task / "children").read_bytes().split())
    return total


def _await_end(pid: int, kill: bool) -> None:
    """Wait for a process that is dying, here the first of its namespace, which dies last.

    Where bubblewrap was killed so early that its child had not yet asked to die with it, the child is killed here.
    """
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            if kill:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], 10)
        finally:
            os.close(process)
    with suppress(ChildProcessError):  # an orphan by now; it is ours to bury where we are the first process ourselves
        os.waitpid(pid, os.WNOHANG)


class _memory_file:
    """A descriptor from which `content` is read, without a file on a disk."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __enter__(self) -> int:
        self._descriptor = os.memfd_create("luciola")
        view = memoryview(self._content)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
