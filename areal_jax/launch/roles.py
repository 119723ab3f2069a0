"""Which processes a run has, with which command and environment; a plain function of the config."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from areal_jax.config import ConfigError
from areal_jax.launch.nodes import Share, share_of
from areal_jax.launch.supervisor import Role, own_env

# On CPUs, XLA takes and returns large buffers in every step. glibc would give them back to the kernel each time, and a
# third of a training step would go to page faults; with these it keeps them, in one heap. Without the cache of each
# thread: XLA's buffers are aligned, and the bytes cut off at both ends would stay there when the buffer is returned, so
# that the hole is too small for the next one of the same size, and the heap grows by another (tests/launch/test_roles).
KEEP_BUFFERS = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}  # fmt: skip


def roles_of(
    config: Mapping[str, Any], workdir: str | os.PathLike, share: Share | None = None
) -> tuple[list[Role], list[str]]:
    """(the roles of this node's `share` of the run, by default all; the names of the leaders: when they have ended, the
    run has). There are no leaders where nothing trains.

    `config` is as from `areal_jax.config.resolve`. Raises `ConfigError` if there are fewer GPUs than asked for.
    """
    share = share or share_of(config)
    launch, workdir = config["launch"], os.path.abspath(workdir)
    base = _base_env(config)
    gpus = GpuShares(launch["rollout_gpus"], len(share.workers), len(share.trainers))
    keepers = ("trainer", "rollout") if config["rollout"]["engine"] == "jax" else ("trainer",)
    keepers = () if visible_gpus() else keepers

    def role(kind: str, name: str, arguments: list[str], extra: Mapping[str, Any], **options) -> Role:
        python = (config["rollout"]["python"] or sys.executable) if kind == "rollout" else sys.executable
        command = (python, "-m", f"areal_jax.{kind}", "--workdir", workdir, *arguments)
        settings = {key: str(value) for key, value in (launch["env"] | dict(extra)).items()}
        env = keeping_buffers(base, settings) if kind in keepers else base | settings
        return Role(name=name, command=command, env=env, **options)

    restarts = launch["restarts"]
    no_gpu = {"JAX_PLATFORMS": "cpu"}
    roles = []
    if share.controller:
        roles.append(role("controller", "controller", [], no_gpu, restarts=restarts, announces=True))
    for i in share.services:
        name = f"rewards-{i}"
        options = {"restarts": restarts, "peers": "rewards", "announces": True}
        roles.append(role("rewards", name, ["--index", str(i)], no_gpu, **options))
    leaders = []
    for place, i in enumerate(share.trainers):
        name = f"trainer-{i}"
        leaders.append(name)
        extra = gpus.trainer(place) | launch["trainer_env"]
        # Several JAX processes are one program: when one dies the others cannot go on, so none is restarted alone.
        again = launch["trainer_restarts"] if config["trainer"]["processes"] == 1 else 0
        roles.append(role("trainer", name, ["--process", str(i)], extra, restarts=again))
    for place, i in enumerate(share.workers):
        extra = gpus.rollout(place) | launch["rollout_env"]
        options = {"restarts": restarts, "nice": launch["rollout_nice"], "peers": "rollout"}
        roles.append(role("rollout", f"rollout-{i}", ["--index", str(i)], extra, **options))
    return roles, leaders


def keeping_buffers(env: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """`env` with `KEEP_BUFFERS` and then `settings`; what was tuned of glibc besides stays tuned."""
    ours, theirs = KEEP_BUFFERS["GLIBC_TUNABLES"], {**env, **settings}.get("GLIBC_TUNABLES", "")
    tunables = theirs if ours in theirs.split(":") else ":".join(filter(None, (ours, theirs)))
    return {**env, **KEEP_BUFFERS, **settings, "GLIBC_TUNABLES": tunables}


def as_role() -> None:
    """Starts this program again with the environment of a role that computes on CPUs, unless it has it: for tools."""
    if not visible_gpus() and (env := keeping_buffers(os.environ, {})) != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


class GpuShares:
    """CUDA_VISIBLE_DEVICES of each role of this machine: the first GPUs to the rollout workers, what is left to the
    trainer, whose processes share it out. Without `each`, workers see all GPUs, as does a trainer of one process."""

    def __init__(self, each: int, workers: int, trainers: int):
        self._each, self._trainers = each, trainers
        self._gpus = visible_gpus() if each or trainers > 1 else []
        self._left = self._gpus[each * workers :]
        if each and (len(self._left) < trainers or each * workers > len(self._gpus)):
            raise ConfigError(
                f"launch.rollout_gpus={each} with {workers} rollout worker(s) on this machine needs {each * workers} "
                f"GPUs, and one or more for each of {trainers} trainer process(es); {len(self._gpus)} are visible"
                + ("" if self._gpus else "; under Slurm, ask for them: sbatch --gpus-per-node=8")
            )

    def rollout(self, index: int) -> dict[str, str]:
        return self._env(self._gpus[index * self._each : (index + 1) * self._each], self._each > 0)

    def trainer(self, index: int) -> dict[str, str]:
        share = len(self._left) // self._trainers
        return self._env(self._left[index * share : (index + 1) * share], self._each > 0 or share > 0)

    @staticmethod
    def _env(gpus: list[str], shared_out: bool) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if shared_out else {}


def visible_gpus() -> list[str]:
    """The ids of the NVIDIA GPUs that this process may use; none without a driver."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def _base_env(config: Mapping[str, Any]) -> dict[str, str]:
    """What all roles inherit: this process's environment, the place of `areal_jax`, and quiet, offline libraries."""
    env = own_env() | {"PYTHONUNBUFFERED": "1"}
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = config["launch"]["compile_cache"]
    if cache:
        env["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(cache)
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    return env
