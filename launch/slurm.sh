#!/usr/bin/env bash
# A run on a Slurm cluster: sbatch --nodes=5 --gpus-per-node=8 launch/slurm.sh CONFIG WORKDIR [settings]
#   WORKDIR must be on a disk that all nodes share. Settings as for the launcher: --config.trainer.steps=20 ...
# Every node has one launcher, which starts the node's roles, starts again what dies, and shares out the node's GPUs; which
# roles are where is said by launch.trainer_nodes. The job ends with the trainer. Told to stop, it saves a checkpoint:
# sbatch it again to go on. VENV: the environment (.venv); INTERFACE: the network of controller, rewards and weights, where
# there are several (ib0). See docs/slurm.md.
#SBATCH --job-name=areal_jax
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: sbatch --nodes=N --gpus-per-node=G launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]" >&2; exit 2; }
config=$1 workdir=$2
shift 2
cd "${SLURM_SUBMIT_DIR:-.}"
python=${VENV:-$PWD/.venv}/bin/python
nodes=${SLURM_JOB_NUM_NODES:?is not set: this is a script for sbatch}
address=tcp://${INTERFACE:-0.0.0.0}:*

# stop_grace: a little less than there is between Slurm's signal and its end of the job.
"$python" -m areal_jax.launch --prepare --nodes="$nodes" --config="$config" --workdir="$workdir" \
  --config.controller.address="$address" --config.rewards.address="$address" --config.launch.stop_grace=540 "$@"

launchers() {  # launchers FIRST COUNT: one job step, a launcher on each of so many nodes
  # shellcheck disable=SC2016  # the variables are those of the task
  srun --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --relative="$1" --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    bash -c 'exec "$0" -m areal_jax.launch --workdir="$1" --nodes="$2" --node=$(($3 + SLURM_PROCID))' \
    "$python" "$workdir" "$nodes" "$1" &
}
# srun kills its tasks at once when it gets a signal itself; this way they get it, and save.
stop() { scancel --signal=TERM "$SLURM_JOB_ID" || true; }
trap stop TERM INT

patience=70  # seconds that launchers may differ by at the end of a run
leave() {  # leave PID: until that step has ended, but no longer than that
  for ((i = 0; i < patience; i++)); do kill -0 "$1" 2>/dev/null || return 0; sleep 1; done
  return 1
}

launchers 0 1
head=$! others=
[ "$nodes" = 1 ] || { launchers 1 $((nodes - 1)); others=$!; }
while kill -0 "$head" 2>/dev/null; do
  if [ -n "$others" ] && ! kill -0 "$others" 2>/dev/null; then
    told=0
    wait "$others" || told=$?
    others=
    [ "$told" = 130 ] || leave "$head" || { echo "slurm.sh: the launchers of all other nodes have ended; stopping the run" >&2; stop; }
  fi
  sleep 1 & wait $! || true  # unlike sleep alone, it ends at once with a signal
done
code=0
wait "$head" || code=$?
[ "$code" = 0 ] || stop  # what waits for the first node waits in vain
[ -z "$others" ] || leave "$others" || { stop; leave "$others" || true; }
exit "$code"  # and Slurm ends what is left
