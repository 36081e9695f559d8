"""Requests that schemathesis makes up from the server's description: nothing fails, and every reply is as promised."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = 250  # of each operation at most, besides those on the borders of its description


def test_made_up_requests(writer: Any, hosting: Any, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    with hosting(writer(["fine", " indeed"], context=128), max_tokens=4) as server:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json", "--max-examples", str(CASES),
            "--seed", "1", "--generation-database", "none", "--exclude-checks", "positive_data_acceptance",
            "--request-timeout", "30", "--report", "ndjson", "--report-dir", str(tmp_path),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=900, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        made = re.search(r"(\d+) generated", done.stdout)
        assert made and int(made[1]) >= 2000
        server.until_free()
