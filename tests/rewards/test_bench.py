"""The benchmark of the verifiers runs, and what it writes can be read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_bench_verifiers_writes_its_rows(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/bench_verifiers.py", "--count", "16", "--repeats", "2", "--processes", "1"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([*command, "--json", out], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = {row["mode"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"numbers_pool", "numbers_math_verify_alone", "latex_pool", "latex_math_verify_alone"}
    for name in ("numbers_pool", "latex_pool"):
        row = rows[name]
        assert row["answers"] == 16 and row["right_accepted"] == row["right"] == 8
        assert row["wrong_accepted"] == row["failures"] == 0
        assert 0 < row["lowest"] <= row["answers_per_second"] <= row["highest"] and row["machine"]
