"""Several JAX processes as one trainer: how they find each other, and how they agree."""

import os
import socket

import jax
import numpy as np

from areal_jax.config import ConfigError
from areal_jax.transport.endpoints import is_loopback, wait_endpoint, write_endpoint

COORDINATOR = "trainer-coordinator"


def start(workdir: str | os.PathLike, process: int, processes: int, address: str, timeout: float = 300.0) -> None:
    """Joins this process with the others; must run before jax touches a device. Nothing to do for one process.

    Process 0 announces a port in the run's folder. `address` is the controller's: on loopback, so is the coordinator.
    JAX's own traffic is neither encrypted nor authenticated. Raises `ConfigError` where it cannot begin.
    """
    if processes == 1:
        return
    if jax.config.jax_platforms == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's own handler of SIGTERM would take the place of ours: the trainer would never hear that it is to save.
    jax.config.update("jax_enable_preemption_service", False)
    if process == 0:
        endpoint, bind = _coordinator(address)
        write_endpoint(workdir, COORDINATOR, endpoint)
    else:
        endpoint, bind = wait_endpoint(workdir, COORDINATOR, timeout), None
    # A process has the GPUs that its launcher made visible to it. By itself JAX would find Slurm's variables, which are
    # about the launcher, and take one GPU.
    jax.distributed.initialize(
        endpoint.removeprefix("tcp://"), processes, process, initialization_timeout=int(timeout),
        coordinator_bind_address=bind, cluster_detection_method="deactivate",
    )  # fmt: skip


def _coordinator(address: str) -> tuple[str, str]:
    """("tcp://HOST:PORT" for the others, "HOST:PORT" to listen on), of a port that is free now."""
    host = "127.0.0.1" if is_loopback(address) else socket.gethostname()
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            found, port = probe.getsockname()
    except OSError as error:
        raise ConfigError(
            f"trainer process 0 cannot listen on the address of its host's name, {host} ({error}): the name must lead "
            f"to an address of this host, in DNS or /etc/hosts"
        ) from None
    # By itself it would listen on every interface, and it knows no keys. Where a host's own name is one of loopback
    # to itself, as on Debian, the others know another address by it: only then it must.
    unreachable = is_loopback(f"tcp://{found}:{port}") and not is_loopback(address)
    return f"tcp://{host}:{port}", f"[::]:{port}" if unreachable else f"{host}:{port}"


def agree(ready: bool, stop: bool) -> tuple[bool, bool]:
    """(every process is ready, some process is to stop); all must call it at the same point."""
    if jax.process_count() == 1:
        return ready, stop
    from jax.experimental import multihost_utils

    told = multihost_utils.process_allgather(np.array([ready, stop]))
    return bool(told[:, 0].all()), bool(told[:, 1].any())
