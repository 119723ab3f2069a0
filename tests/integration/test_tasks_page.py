"""docs/tasks.md from top to bottom: its files are written, its commands are run, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^`(?P<file>[\w/.]+)`\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_is_a_file_or_a_command():
    blocks = list(BLOCK.finditer(PAGE))
    assert {block["kind"] for block in blocks} == {"python", "bash"} and PAGE.count("```") == 2 * len(blocks)
    assert all(bool(block["file"]) == (block["kind"] == "python") for block in blocks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_works_as_it_is_written(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for block in BLOCK.finditer(PAGE):
        if block["file"]:
            (tmp_path / block["file"]).parent.mkdir(exist_ok=True)
            (tmp_path / block["file"]).write_text(block["body"])
            continue
        command = ["bash", "-euo", "pipefail", "-c", block["body"]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{block['body']}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def load(name):
        return json.loads((tmp_path / "runs" / name).read_text())

    reported, again, sampled = load("mytask/summary.json"), load("mytask/eval/summary.json"), None
    assert reported["steps"] == 3
    assert again["accuracy"] == pytest.approx(reported["accuracy_after"], abs=1e-12)
    assert again["problems"] == 40 and set(again["metrics"]) == {"lines"}
    sampled = load("mytask/eval-sampled/summary.json")
    assert list(sampled["estimates"]) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    before = load("before/summary.json")
    assert before["accuracy"] == pytest.approx(reported["accuracy_before"], abs=1e-12)
    steps = [json.loads(line) for line in (tmp_path / "runs/twice/metrics.jsonl").read_text().splitlines()]
    assert any("reward/changed" in step for step in steps)  # the workflow's own number
    shaped = [step for step in steps if "reward/lines" in step]
    assert all(step["reward/mean"] <= step["reward/accuracy"] for step in shaped) and shaped
