"""What a run ran on: versions, commit, machine and the dtype chosen there."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from luciola import hardware

PACKAGES = ("luciola", "torch", "numpy", "tokenizers", "safetensors")


def environment(kind: str, dtype: str) -> dict[str, Any]:
    """The facts of environment.json; `dtype` is what the recipe asks for, and "auto" is resolved."""
    chosen, reason = hardware.choose_dtype(dtype)
    return {
        "kind": kind,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": hardware.cpu_name(),
        "cores": hardware.cores(),
        "threads": hardware.threads(),
        "memory_bytes": hardware.memory_bytes(),
        "dtype": chosen,
        "dtype_reason": reason,
    }


def commit() -> str | None:
    """The git commit of the checkout that Luciola runs from, "+changes" if files differ; None when installed."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # a checkout copied to a machine without git
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
