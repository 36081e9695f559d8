"""Starting the program: fast, and without loading what the command does not need."""

import resource
import subprocess
import sys

import pytest

FLOOR_0 = ("recipe", "run", "hardware", "text", "verify", "tasks")


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys; print('modules:', *sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in output.rpartition("modules:")[2].split()}


@pytest.mark.parametrize("room", [*FLOOR_0, "cli"])
def test_these_rooms_import_without_torch(room: str) -> None:
    assert "torch" not in loaded_by(f"import luciola.{room}")


def test_help_loads_nothing_it_does_not_show() -> None:
    heavy = {"torch", "numpy", "pydantic", "tokenizers", "rich", "matplotlib", "transformers"}
    code = "from luciola.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass"
    assert loaded_by(code) & heavy == set()


def test_help_answers_within_three_tenths_of_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "luciola", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time rather than the clock's: the machine may be busy with other tests.
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3
