"""What this machine can do: cores, memory, and the speed of its arithmetic, measured rather than assumed.

On one CPU generation bfloat16 products are twice as fast as float32 ones, on the generation before ten times slower;
`dtype = "auto"` follows a measurement that takes a fraction of a second, once per machine and torch version.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BUDGET = 0.15  # seconds for each measurement
FORMAT = 3  # of the kept measurements; a change of what `measured` returns raises it
WORTHWHILE = 1.3  # bfloat16 loses precision, so it must be this much faster to be chosen


def choose_dtype(requested: str) -> tuple[str, str]:
    """The torch dtype ("float32" or "bfloat16") that `requested` means here, and the reason in words.

    "auto" takes bfloat16 on a GPU with support for it, and on a CPU where its products are measured to be faster.
    """
    if requested in ("float32", "bfloat16"):
        return requested, "as requested"
    if requested != "auto":
        raise ValueError(f"dtype = '{requested}' is unknown; choose 'auto', 'float32' or 'bfloat16'")
    speeds = measured()
    if "cuda" in speeds:
        name = speeds["cuda"]["name"]
        if speeds["cuda"]["bfloat16"]:
            return "bfloat16", f"{name} computes in bfloat16"
        return "float32", f"{name} does not compute in bfloat16"
    float32, bfloat16 = speeds["core_gflops"]["float32"], speeds["core_gflops"]["bfloat16"]
    numbers = f"measured on one core: float32 {float32:.0f} GFLOP/s, bfloat16 {bfloat16:.0f} GFLOP/s"
    if bfloat16 >= WORTHWHILE * float32:
        return "bfloat16", f"{numbers}; bfloat16 is {bfloat16 / float32:.1f} times as fast"
    return "float32", f"{numbers}; bfloat16 would not be worth its lower precision"


def measured() -> dict[str, Any]:
    """Measured speeds: `gemm_gflops` by dtype with all threads, `core_gflops` by dtype with one, `bandwidth_gb_per_s`,
    and with a GPU `cuda` (name, memory_bytes ...).

    The dtype is chosen by the speed of one core: threads that wait for each other on a busy machine would falsify the
    comparison.

    Kept in the user's cache folder for this CPU, number of threads and torch version, unless the machine was busy or
    the folder cannot be written: then the next process measures again.
    """
    path = cache_folder() / f"hardware-{_fingerprint()}.json"
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    except (OSError, ValueError):
        pass  # not there yet, not readable, or torn
    speeds = _measure()
    if os.getloadavg()[0] > cores() / 2:
        return speeds
    busy = any(speeds["gemm_gflops"][dtype] < speeds["core_gflops"][dtype] / 2 for dtype in ("float32", "bfloat16"))
    if busy:
        return speeds  # all cores slower than one: other programs were running, and this is nothing to keep
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(speeds))
        temporary.replace(path)
    except OSError:
        pass
    return speeds


@cache
def _measure() -> dict[str, Any]:
    speeds: dict[str, Any] = {
        "gemm_gflops": {dtype: _gemm_gflops(dtype) for dtype in ("float32", "bfloat16")},
        "core_gflops": {dtype: _gemm_gflops(dtype, one_thread=True) for dtype in ("float32", "bfloat16")},
        "bandwidth_gb_per_s": _bandwidth(),
    }
    if (gpu := _cuda()) is not None:
        speeds["cuda"] = gpu
    return speeds


def gemm_peak(dtype: str) -> float:
    """Fastest matrix products seen on this machine, in operations a second: what `mfu` is a share of.

    Measured once more here, because the kept figure may stem from a busy moment; the higher one counts.
    """
    kept: float = measured()["gemm_gflops"][dtype]
    return 1e9 * max(kept, _gemm_gflops(dtype))


def bandwidth() -> float:
    """Fastest reading of memory seen on this machine, in bytes a second: the limit of decoding one sequence."""
    kept: float = measured()["bandwidth_gb_per_s"]
    return 1e9 * max(kept, _bandwidth())


def cache_folder() -> Path:
    """Where Luciola keeps what it can make again: $XDG_CACHE_HOME/luciola, or ~/.cache/luciola."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luciola"


def cores() -> int:
    """Cores that this process may use: its affinity, and the container's quota rounded up."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(available, -(-int(quota) // int(period))))
    return available


def threads() -> int:
    """Threads that torch will use: OMP_NUM_THREADS where it is set, or a thread a core."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() and int(wish) > 0 else cores()


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def available_memory_bytes() -> int:
    """Memory that is free, or could be freed, now; never more than `memory_bytes()` less what the container uses."""
    used = _read("/sys/fs/cgroup/memory.current")
    left = (
        memory_bytes() - int(used)
        if used.isdigit() and _read("/sys/fs/cgroup/memory.max").isdigit()
        else memory_bytes()
    )
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return max(0, min(left, int(line.split()[1]) * 1024))
    return max(0, left)


def peak_memory_bytes() -> int:
    """Most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next tensor instead of returning it to the system.

    By default glibc maps every large tensor anew, and the kernel zeroes each page at its first touch: on a CPU this
    makes large elementwise operations three to five times slower than the arithmetic. Other C libraries: no effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 << 20)


def cpu_name() -> str:
    """The processor's name, such as "AMD EPYC 9B14"."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector extensions that decide the speed of arithmetic, of those the processor has."""
    flags = next((line.split() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("flags")), [])
    telling = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    return [flag for flag in telling if flag in flags]


def torch_version() -> str:
    """The version of the installed torch, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed"


def _gemm_gflops(dtype: str, *, one_thread: bool = False) -> float:
    """Speed of square matrix products, in 1e9 operations a second, the best of a few sizes that fit the time."""
    import torch

    speed, before = 0.0, torch.get_num_threads()
    if one_thread:
        torch.set_num_threads(1)
    try:
        for size in (256, 512, 1024):
            a, b = (torch.ones(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            operations = 2 * size**3
            if speed and operations / speed > BUDGET / 6:
                break  # too slow for a larger size
            speed = max(speed, operations / _best_time(partial(torch.mm, a, b, out=out), BUDGET / 4))
    finally:
        torch.set_num_threads(before)
    return speed / 1e9


def _bandwidth() -> float:
    """Speed of reading memory, in 1e9 bytes a second: a matrix-vector product over more than the caches hold."""
    import torch

    matrix, vector = torch.ones(1 << 16, 1 << 10), torch.ones(1 << 10)  # 256 MiB
    return matrix.nbytes / _best_time(partial(torch.mv, matrix, vector), BUDGET) / 1e9


def _best_time(call: Callable[[], object], budget: float) -> float:
    """Shortest time of a call, in seconds, after one to warm up."""
    call()
    best, end = float("inf"), time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _cuda() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _fingerprint() -> str:
    facts = [
        FORMAT,
        cpu_name(),
        *cpu_features(),
        threads(),
        torch_version(),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read(path: str) -> str:
    """A small system file, or nothing on systems that lack it."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
