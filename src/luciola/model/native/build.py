"""Compile the C kernels of this folder, once per machine, and load them.

All `*.c` files become one shared library in the user's cache folder, named by a digest of the sources, the compiler
with its arguments and the processor, so that a changed source or another machine compiles anew. OpenMP's runtime is the
one that torch has loaded already: both share one pool of threads.

Set LUCIOLA_NATIVE=0 to do without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from luciola import hardware

FOLDER = Path(__file__).parent
# Sums may be taken in vector lanes; infinities and NaN keep their meaning: by them damaged weights are noticed.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
SECONDS = 120  # a compiler that takes longer is taken for hung


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call; None where `reason()` says why."""
    return _found()[0]


def reason() -> str:
    """Why there are no native kernels; empty if there are."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("LUCIOLA_NATIVE", "") == "0":
        return None, "switched off by LUCIOLA_NATIVE=0"
    compiler = shlex.split(os.environ.get("CC", "")) or _first("cc", "gcc", "clang")
    if not compiler or shutil.which(compiler[0]) is None:
        return None, "no C compiler (cc, gcc or clang, or the one named by CC) is installed"
    try:
        return _load(compiler), ""
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return None, f"{compiler[0]} failed: {lines[0] if lines else 'it says nothing'}"
    except subprocess.TimeoutExpired:
        return None, f"{compiler[0]} did not finish within {SECONDS} seconds"
    except OSError as error:
        return None, f"{compiler[0]} failed: {error}"


def _first(*names: str) -> list[str]:
    return next(([name] for name in names if shutil.which(name)), [])


def _load(compiler: list[str]) -> ctypes.CDLL:
    import torch  # noqa: F401  # its OpenMP runtime must be loaded before the library looks for one

    sources = sorted(FOLDER.glob("*.c"))
    told = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    facts = [source.read_bytes() for source in (*sources, *sorted(FOLDER.glob("*.h")))]
    facts += [
        told,
        *map(str.encode, compiler[1:]),
        " ".join(FLAGS).encode(),
        hardware.cpu_name().encode(),
        " ".join(hardware.cpu_features()).encode(),
    ]
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    folder = hardware.cache_folder()
    path = folder / f"native-{digest}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as place:
        made = Path(place, path.name)
        command = [*compiler, *FLAGS, *map(str, sources), "-o", str(made), "-lm"]
        subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            shutil.copy(made, beside)
            beside.replace(path)
        except OSError:
            return ctypes.CDLL(str(made))  # a cache that cannot be written: compile again next time
        return ctypes.CDLL(str(path))
