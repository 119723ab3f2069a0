"""Starts whole runs as a user would, in processes of their own; not a test itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from areal_jax.launch import child

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "configs" / "toy"


def environment() -> dict[str, str]:
    """A user's environment: none of the test suite's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def python(*arguments, timeout: float) -> subprocess.CompletedProcess:
    """Runs this interpreter in the repository; shows its output if it fails."""
    command = [sys.executable, "-S", child.__file__, str(os.getpid()), "0"]  # killed tests leave no run behind
    command += [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=timeout, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-4000:])
    return done


def launch(workdir: Path, *, config="configs/quickstart.py", timeout=400.0, code=0, **settings) -> dict:
    """A whole run with these settings (`section__key=value`), to its end; its summary."""
    changes = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    done = python(
        "-m", "areal_jax.launch", f"--config={config}", f"--workdir={workdir}", "--config.metrics.view=lines", *changes,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}, see the captured output and {workdir}/logs"
    summary = workdir / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {}


def lines(workdir: Path) -> list[dict]:
    """All of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir: Path) -> list[dict]:
    """The training steps of metrics.jsonl."""
    return [row for row in lines(workdir) if "actor/loss" in row]


def unexplained(workdir: Path) -> set[str]:
    """Names in metrics.jsonl that docs/metrics.md does not have; `<...>` there stands for any ending."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    known = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    patterns = [re.sub("<.*>", "[a-z0-9_]+", name) + "$" for name in (*known, "step")]
    return {name for row in lines(workdir) for name in row if not any(re.match(p, name) for p in patterns)}
