"""Whether a model fits the GPUs it is given, asked before anything starts; silent where their memory is unknown."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from areal_jax.config import ConfigError, section
from areal_jax.launch.nodes import share_of
from areal_jax.launch.roles import visible_gpus
from areal_jax.trainer import memory
from areal_jax.trainer.config import TrainerConfig

_JAX_TAKES = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_VLLM_TAKES = 0.9  # unless gpu_memory_utilization does


def gpu_memory() -> list[int]:
    """Bytes of each GPU that this process may use; empty where there is none, or they cannot be asked."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    gpus = visible_gpus()
    if not gpus:
        return []
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        found: dict[str, int] = {}
        for line in text.splitlines():
            index, uuid, mebibytes = (part.strip() for part in line.split(","))
            found[index] = found[uuid] = int(mebibytes) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [found[gpu] for gpu in gpus] if all(gpu in found for gpu in gpus) else []


def check_memory(config: Mapping[str, Any], gpus: Sequence[int], nodes: int = 1) -> None:
    """Raises `ConfigError`, in one line, when the model does not fit `gpus` (bytes of each on this machine).

    Of a run on several `nodes`, all are taken to be like this one. Says nothing without GPUs, about several trainer
    processes whose nodes are not known (0), and about what shares a GPU with something else.
    """
    from areal_jax.models.config import ModelConfig

    launch, rollout, trainer = config["launch"], config["rollout"], section(TrainerConfig, config["trainer"])
    env = os.environ | launch["env"] | launch["trainer_env"]
    each = launch["rollout_gpus"]
    if not gpus or "cpu" in str(env.get("JAX_PLATFORMS", "")):
        return
    model = ModelConfig.from_hf(config["model"])
    shares = [share_of(config, node, nodes) for node in range(nodes)]
    workers = max((len(share.workers) for share in shares), default=1)
    if each and rollout["engine"] == "vllm":
        check_engine(model, rollout, each, min(gpus[: each * workers]))
    elif rollout["engine"] == "vllm" and workers > 1 and "gpu_memory_utilization" not in rollout["engine_args"]:
        raise ConfigError(
            f"launch.rollout_gpus=0 lets {workers} rollout workers of one machine use the same GPU, of which vLLM "
            f"takes {_VLLM_TAKES:.0%}: set launch.rollout_gpus, or gpu_memory_utilization in rollout.engine_args"
        )
    if not shares:
        return
    trainers = len(shares[0].trainers)  # the first node trains in any case
    left = list(gpus[each * len(shares[0].workers) :])
    if len(left) >= trainers and (each or rollout["engine"] == "jax" or not shares[0].workers):
        devices, fraction = len(left) // trainers * trainer.processes, env.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        check_trainer(model, trainer, [min(left)] * devices, float(fraction or _JAX_TAKES))


def check_trainer(model: Any, trainer: TrainerConfig, gpus: Sequence[int], fraction: float = _JAX_TAKES) -> None:
    """Raises `ConfigError` unless a training step of `model` fits on `gpus`, of whose memory JAX takes `fraction`."""
    try:
        need = memory.trainer(model, trainer, len(gpus))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if need.total - memory.RUNTIME > fraction * min(gpus) or need.total > min(gpus):
        raise ConfigError(
            f"the trainer needs about {need} on each of {len(gpus)} GPUs of {min(gpus) / memory.GIB:.0f} GiB, of which "
            f"JAX takes {fraction:.0%}: use more GPUs, trainer.remat='full', fewer trainer.rows, a shorter row_length, "
            f"trainer.tensor or lora_rank, or set XLA_PYTHON_CLIENT_MEM_FRACTION in launch.trainer_env"
        )


def check_engine(model: Any, rollout: Mapping[str, Any], each: int, gpu: int) -> None:
    """Raises `ConfigError` unless the weights and the cache of one longest sequence fit on a worker's GPUs."""
    arguments = rollout["engine_args"]
    split = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    if split > each:
        raise ConfigError(
            f"rollout.engine_args split the model over {split} GPUs, and launch.rollout_gpus gives a worker {each}"
        )
    need = memory.engine(model, rollout["dtype"], rollout["max_length"], split)
    fraction = arguments.get("gpu_memory_utilization", _VLLM_TAKES)
    if need.total > fraction * gpu:
        raise ConfigError(
            f"a rollout worker needs about {need} on each of {split} GPUs of {gpu / memory.GIB:.0f} GiB, of which vLLM "
            f"takes {fraction:.0%}: raise tensor_parallel_size in rollout.engine_args and launch.rollout_gpus, or "
            f"shorten rollout.max_length"
        )
