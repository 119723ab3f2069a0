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
    run's folder. `address` is the controller's: on loopback, so is the coordinator. JAX's own traffic is neither
    encrypted nor authenticated.
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
            found, port = probe.getsockname()
        endpoint = f"tcp://{host}:{port}"
        # By itself it would listen on every interface, and it knows no keys. Where a host's own name is one of loopback
        # to itself, as on Debian, the others know another address by it: only then it must.
        unreachable = is_loopback(f"tcp://{found}:{port}") and not is_loopback(address)
        bind = f"[::]:{port}" if unreachable else f"{host}:{port}"
        write_endpoint(workdir, COORDINATOR, endpoint)
    else:
        endpoint, bind = wait_endpoint(workdir, COORDINATOR, timeout), None
    jax.distributed.initialize(
        endpoint.removeprefix("tcp://"), processes, process, initialization_timeout=int(timeout),
        coordinator_bind_address=bind,
    )  # fmt: skip


def agree(ready: bool, stop: bool) -> tuple[bool, bool]:
    """(every process is ready, some process is to stop); all must call it at the same point."""
    if jax.process_count() == 1:
        return ready, stop
    from jax.experimental import multihost_utils

    told = multihost_utils.process_allgather(np.array([ready, stop]))
    return bool(told[:, 0].all()), bool(told[:, 1].any())
