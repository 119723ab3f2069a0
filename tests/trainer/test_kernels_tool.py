"""tools/bench_kernels.py finds small errors where there are none, and a large one where there is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_kernels.py"


@pytest.mark.slow
def test_both_parts_are_checked_against_their_oracles(tmp_path):
    path = tmp_path / "kernels.json"
    options = ["--tokens=512", "--row-length=256", "--max-segments=8", "--logits=32768", "--repeats=1"]
    subprocess.run([sys.executable, TOOL, *options, f"--json={path}"], check=True, capture_output=True)
    attention, logprobs = json.loads(path.read_text())
    assert attention["what"] == "attention" and logprobs["what"] == "logprobs"
    assert 0 < attention["error_out"] < 1e-2 and 0 < attention["error_gradient"] < 1e-2  # bf16 against float32
    assert logprobs["chunk"] == 128 and logprobs["tokens"] == 512  # several chunks
    assert 0 < logprobs["error_values"] < 2e-3 and 0 < logprobs["error_gradient"] < 1e-2
    assert min(attention["seconds"], logprobs["seconds"]) > 0


def test_the_error_is_relative_to_the_oracle(monkeypatch):
    monkeypatch.syspath_prepend(TOOL.parent)
    import bench_kernels

    want = [np.array([3.0, 0.0]), np.array([4.0])]
    assert bench_kernels.relative(want, want) == 0
    assert bench_kernels.relative([np.array([3.0, 1.0]), np.array([4.0])], want) == pytest.approx(0.2)
