"""Hardware: measured once, remembered, and never a reason to fail."""

import json
from pathlib import Path

import pytest

from luciola import hardware


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    hardware._measure.cache_clear()
    return tmp_path / "luciola"


def speeds(float32: float, bfloat16: float, **more: object) -> dict[str, object]:
    by_dtype = {"float32": float32, "bfloat16": bfloat16}
    return {"gemm_gflops": by_dtype, "core_gflops": by_dtype, "bandwidth_gb_per_s": 20.0} | more


def test_the_machine_has_something_to_work_with() -> None:
    assert hardware.cores() >= 1
    assert hardware.threads() >= 1
    assert 0 < hardware.available_memory_bytes() <= hardware.memory_bytes()
    assert hardware.cpu_name()


def test_speeds_are_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hardware.measured()
    assert first["gemm_gflops"]["float32"] > 0.1
    assert first["gemm_gflops"]["bfloat16"] > 0.01
    assert first["core_gflops"].keys() == {"float32", "bfloat16"}
    assert first["bandwidth_gb_per_s"] > 0.1
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(hardware, "_measure", lambda: pytest.fail("measured twice"))
    assert hardware.measured() == first
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with pytest.raises(pytest.fail.Exception):
        hardware.measured()


def test_what_a_busy_machine_measured_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_measure", lambda: speeds(8, 3))
    monkeypatch.setattr("os.getloadavg", lambda: (100.0, 0.0, 0.0))
    assert hardware.measured() == speeds(8, 3)
    assert not cache.exists()


def test_an_unwritable_or_torn_cache_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_measure", lambda: speeds(100, 50))
    expected = hardware.measured()
    (file,) = cache.iterdir()
    file.write_text('{"gemm_gfl')
    assert hardware.measured() == expected
    assert json.loads(file.read_text()) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert hardware.measured() == expected


@pytest.mark.parametrize(
    ("machine", "dtype", "reason"),
    [
        (speeds(188, 430), "bfloat16", "2.3 times as fast"),
        (speeds(130, 13), "float32", "not be worth"),
        (speeds(100, 110), "float32", "not be worth"),
        (speeds(1, 1, cuda={"name": "H800", "bfloat16": True}), "bfloat16", "H800"),
        (speeds(1, 9, cuda={"name": "T4", "bfloat16": False}), "float32", "T4"),
    ],
)
def test_auto_follows_the_measurement(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, object], dtype: str, reason: str
) -> None:
    monkeypatch.setattr(hardware, "measured", lambda: machine)
    chosen, why = hardware.choose_dtype("auto")
    assert chosen == dtype
    assert reason in why
    assert hardware.choose_dtype("float32") == ("float32", "as requested")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype = 'float16' is unknown; choose"):
        hardware.choose_dtype("float16")
