"""Several JAX processes as one trainer: how they find each other, and how they agree."""

import os
import socket

import jax
import numpy as np

from areal_jax.transport.endpoints import is_loopback, wait_endpoint, write_endpoint

COORDINATOR = "trainer-coordinator"


def start(workdir: str | os.PathLike, process: int, processes: int, address: str, timeout: float = 120.0) -> None:
    """Joins this process with the others; must run before jax touches a device. Nothing to do for one process.

    Inside a Slurm step with as many tasks jax finds the others by itself; elsewhere process 0 announces a port in the
    run's folder. `address` is the controller's: on loopback, so is the coordinator.
    """
    if processes == 1:
        return
    if jax.config.jax_platforms == "cpu" or os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if int(os.environ.get("SLURM_NTASKS", "0")) == processes and "SLURM_STEP_NODELIST" in os.environ:
        jax.distributed.initialize()
        return
    if process == 0:
        host = "127.0.0.1" if is_loopback(address) else socket.gethostname()
        with socket.socket() as probe:
            probe.bind((host, 0))
            endpoint = f"tcp://{host}:{probe.getsockname()[1]}"
        write_endpoint(workdir, COORDINATOR, endpoint)
    else:
        endpoint = wait_endpoint(workdir, COORDINATOR, timeout)
    jax.distributed.initialize(endpoint.removeprefix("tcp://"), processes, process, initialization_timeout=int(timeout))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it at the same point."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def broadcast(values: np.ndarray) -> np.ndarray:
    """Process 0's array in every process; all must call it, with arrays of one shape and dtype."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))
