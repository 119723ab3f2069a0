"""Starts one reward service: python -m areal_jax.rewards --workdir DIR --index I"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import signal
import sys

from areal_jax import config as configs
from areal_jax.disk import DiskFull, insist
from areal_jax.exits import WRONG_SETTING
from areal_jax.metrics.clock import Clock, trace_path
from areal_jax.rewards.config import RewardsConfig
from areal_jax.rewards.outcome import VerifierError
from areal_jax.rewards.pool import VerifierPool
from areal_jax.rewards.service import RewardService, recipe_of
from areal_jax.transport.endpoints import still_starting
from areal_jax.transport.errors import TransportError
from areal_jax.transport.sockets import Client, Server


async def serve(workdir: str, index: int) -> int:
    """Runs service number `index` of the run in `workdir`; returns the exit code."""
    name = f"rewards-{index}"
    clock = Clock(trace=trace_path(workdir, name))
    values = configs.load(workdir)
    config = configs.section(RewardsConfig, values["rewards"])
    limit = 4 * values["controller"]["heartbeat_limit"]
    recipe = recipe_of(config)
    service = RewardService(
        recipe,
        name=name,
        pool=VerifierPool(config.processes, config.timeout),
        server=insist(
            lambda: Server(config.address, name, workdir),
            values["controller"]["disk_limit"],
            sleep=functools.partial(still_starting, workdir, name),
        ),
        connect=lambda hello: Client(name, workdir, hello=hello, timeout=limit),
        clock=clock,
        max_pending=config.max_pending,
        controller_limit=limit,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop, 0, signal.Signals(number).name)
    return await service.run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m areal_jax.rewards", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder, with config.json")
    parser.add_argument("--index", type=int, default=0, help="which of the reward services this is")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rewards %(levelname)s %(message)s", stream=sys.stderr)
    try:
        sys.exit(asyncio.run(serve(args.workdir, args.index)))
    except (ValueError, OSError, DiskFull, TransportError, VerifierError) as error:
        print(f"rewards-{args.index}: {error}", file=sys.stderr)
        sys.exit(WRONG_SETTING if isinstance(error, configs.ConfigError) else 1)


if __name__ == "__main__":
    main()
