"""Starts one rollout worker: python -m areal_jax.rollout --workdir DIR --index I"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import signal
import sys

from areal_jax import config as configs
from areal_jax.data.config import DataConfig
from areal_jax.data.prompts import load_tokenizer
from areal_jax.exits import WRONG_SETTING
from areal_jax.metrics.clock import Clock, trace_path
from areal_jax.rewards.config import RewardsConfig
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.factory import make_engine, samplings
from areal_jax.rollout.verification import RewardClients
from areal_jax.rollout.worker import Worker, WorkerSettings
from areal_jax.rollout.workflows import load_workflow
from areal_jax.transport.client import Client


async def serve(workdir: str, index: int) -> int:
    """Run worker number `index` of the run in `workdir`; returns the exit code."""
    clock = Clock(trace=trace_path(workdir, f"rollout-{index}"))
    values = configs.load(workdir)
    rollout = configs.section(RolloutConfig, values["rollout"])
    if rollout.exact == "sync" and values["controller"]["max_staleness"] == 0:
        rollout = dataclasses.replace(rollout, exact="always")
    rewards = configs.section(RewardsConfig, values["rewards"])
    tokenizer = load_tokenizer(values["model"])
    name = f"rollout-{index}"
    sampling, eval_sampling = samplings(rollout, values["model"], tokenizer)
    settings = WorkerSettings(
        name=name,
        seed=values["seed"],
        sampling=sampling,
        eval_sampling=eval_sampling,
        data=configs.section(DataConfig, values["data"]),
        controller_limit=4 * values["controller"]["heartbeat_limit"],
    )
    services = [Client(name, workdir, server=f"rewards-{i}") for i in range(rewards.services)]
    worker = Worker(
        settings,
        engine=make_engine(rollout, values["model"], seed=values["seed"] * 1009 + index, workdir=workdir),
        workflow=load_workflow(rollout.workflow, rollout.workflow_args),
        tokenizer=tokenizer,
        verifier=RewardClients(services, patience=2 * rewards.timeout, limit=10 * rewards.timeout),
        connect=lambda hello: Client(name, workdir, hello=hello, timeout=settings.controller_limit),
        clock=clock,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop, 0, signal.Signals(number).name)
    return await worker.run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m areal_jax.rollout", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder, with config.json")
    parser.add_argument("--index", type=int, default=0, help="which of the rollout workers this is")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rollout %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it tells of every kind of device that is not there
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(asyncio.run(serve(args.workdir, args.index)))
    except (ValueError, OSError) as error:
        print(f"rollout-{args.index}: {error}", file=sys.stderr)
        sys.exit(WRONG_SETTING if isinstance(error, configs.ConfigError) else 1)


if __name__ == "__main__":
    main()
