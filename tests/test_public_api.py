"""The public names exist, and importing the package costs no torch."""

import subprocess
import sys

import pytest

import luciola


def test_names() -> None:
    assert set(luciola.__all__) <= set(dir(luciola))
    for name in luciola.__all__:
        assert getattr(luciola, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = luciola.nothing


@pytest.mark.parametrize("module", ["luciola", "luciola.text.tokenizer", "luciola.text.bpe", "luciola.recipe"])
def test_floor_0_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
