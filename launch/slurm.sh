#!/usr/bin/env bash
# A run on a Slurm cluster, with the same roles as on one machine: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [settings]
#   WORKDIR must be on a disk that all nodes share. Settings as for the launcher: --config.trainer.steps=20 ...
# The first node runs the controller and the reward services; the trainer's tasks come next, the rollout workers fill what
# is left. The job ends with the trainer; sbatch it again to go on from the last checkpoint. See docs/slurm.md.
#SBATCH --job-name=areal_jax
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]" >&2; exit 2; }
config=$1 workdir=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-.}"
python=${VENV:-$PWD/.venv}/bin/python
rollout_python=${ROLLOUT_PYTHON:-$python}
gpus_per_task=${GPUS_PER_TASK:-}   # e.g. 1: asks Slurm for so many GPUs per trainer task; rollout_gpus per worker is in the config
addresses=(--config.controller.address="${CONTROLLER_ADDRESS:-tcp://0.0.0.0:*}" --config.rewards.address=tcp://0.0.0.0:*)

"$python" -m areal_jax.launch --prepare --config="$config" --workdir="$workdir" "${addresses[@]}" "$@"
mkdir -p "$workdir/logs"
read -r services workers trainers rollout_gpus < <("$python" - "$workdir" <<'PYTHON'
import sys
from areal_jax.config import load
c = load(sys.argv[1])
print(c["rewards"]["services"], c["rollout"]["workers"], c["trainer"]["processes"], c["launch"]["rollout_gpus"])
PYTHON
)
rm -rf "$workdir/endpoints"

steps=()
start() {  # start NAME SRUN-OPTIONS... -- COMMAND...: one job step in the background, with its own log
  local name=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  srun --overlap --kill-on-bad-exit=0 "${options[@]}" --output="$workdir/logs/$name.log" --open-mode=append "$@" &
  steps+=($!)
}
gpus() { if [ "${1:-0}" != 0 ] && [ -n "$1" ]; then echo "--gpus-per-task=$1"; else echo "--export=ALL"; fi; }

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
start controller --nodes=1 --ntasks=1 --nodelist="$first" -- "$python" -m areal_jax.controller --workdir "$workdir"
start rewards-%t --nodes=1 --ntasks="$services" --nodelist="$first" -- \
  bash -c "exec $python -m areal_jax.rewards --workdir $workdir --index \$SLURM_PROCID"
start trainer-%t --ntasks="$trainers" "$(gpus "$gpus_per_task")" -- \
  bash -c "exec $python -m areal_jax.trainer --workdir $workdir --process \$SLURM_PROCID"
trainer=${steps[-1]}
start rollout-%t --ntasks="$workers" "$(gpus "$rollout_gpus")" -- \
  bash -c "exec $rollout_python -m areal_jax.rollout --workdir $workdir --index \$SLURM_PROCID"

# Slurm's signal before the time limit, or scancel: the trainer saves a checkpoint, then everything goes.
trap 'kill -TERM "$trainer" 2>/dev/null || true' TERM INT
code=0
wait "$trainer" || code=$?
while kill -0 "$trainer" 2>/dev/null; do wait "$trainer" || code=$?; done  # a signal interrupts the first wait
sleep 5  # the others leave by themselves when the run is finished
for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
wait || true
exit "$code"
