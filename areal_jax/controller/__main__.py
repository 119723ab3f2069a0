"""Start the controller of a run: python -m areal_jax.controller --workdir DIR"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from areal_jax import config as configs
from areal_jax.controller.config import ControllerConfig
from areal_jax.controller.core import Core, Silent
from areal_jax.controller.journal import Journal
from areal_jax.controller.service import Service
from areal_jax.controller.snapshot import StateError
from areal_jax.data.prompts import load_prompts, load_tokenizer
from areal_jax.data.readers import DataError, Dataset
from areal_jax.disk import DiskFull, insist, release, write_whole
from areal_jax.exits import CANNOT_GO_ON, WRONG_SETTING
from areal_jax.rewards.loading import record_check
from areal_jax.rewards.outcome import VerifierError
from areal_jax.transport.endpoints import still_starting
from areal_jax.transport.errors import TransportError
from areal_jax.transport.silence import Silence, report_silence
from areal_jax.transport.sockets import Server

log = logging.getLogger(__name__)
MOST_PLACES = 20  # of records that are left out, in the log


def make_core(
    config: dict[str, Any], incarnation: int, now: float, going_on: Callable[[], None] = lambda: None
) -> Core:
    """The core of the run that `config` (as from `areal_jax.config.load`) describes; raises `DataError`.

    `going_on()` is called now and then: reading the data may take minutes.
    """
    train = _load("train", config, going_on)
    evaluation = _load("eval", config, going_on) if config["data"]["eval"] else Dataset("", [])
    return Core(
        configs.section(ControllerConfig, config["controller"]),
        train,
        list(evaluation),
        seed=config["seed"],
        rolling=config["rollout"]["rolling_updates"],
        update_limit=2 * config["rollout"]["weights_timeout"],
        stop_on_failure=config["rewards"]["on_error"] == "stop",
        incarnation=incarnation,
        steps=config["trainer"]["steps"],
        skipped_records=len(train.skipped) + len(evaluation.skipped),
        now=now,
    )


def _load(key: str, config: dict[str, Any], going_on: Callable[[], None]) -> Dataset:
    """The data set `data.key`, without the records that the settings say to skip; the log names those.

    Where they say "error", the launcher has looked for them, and nothing is looked at again.
    """
    going_on()
    data = config["data"]
    options = {"check": record_check(config)} if data["bad_record"] == "skip" else {}
    tokenizer = load_tokenizer(config["model"]) if data["too_long"] == "skip" else None
    dataset = load_prompts(key, config, tokenizer, tell=log.warning, going_on=going_on, **options)
    for place in dataset.skipped[1:MOST_PLACES]:
        log.warning("data.%s: left out, too: %s", key, place)
    return dataset


def next_incarnation(workdir: Path) -> int:
    """How many controllers this run has had before; counts this one."""
    path = workdir / "controller.incarnation"
    count = int(path.read_text()) if path.exists() else 0
    write_whole(path, str(count + 1))
    return count


async def serve(core: Core, config: dict[str, Any], workdir: Path) -> str | None:
    """Serve until the run is over, or SIGTERM or SIGINT asks for an end. Returns the diagnosis of a failed run."""
    limit, wait = core.config.disk_limit, partial(still_starting, workdir, "controller")
    journal = insist(lambda: Journal(workdir), limit, sleep=wait)
    if journal.recover(core, time.monotonic()):
        core.telemetry.note("took over from a controller that was killed", time.monotonic())

    def on_silence(silent: Silent) -> None:
        report_silence(workdir, silent.name, Silence(silent.host, silent.pid, silent.seconds, silent.phase))

    async with insist(lambda: Server(core.config.address, "controller", workdir), limit, sleep=wait) as server:
        farewell = config["launch"]["stop_grace"]  # as long as the trainer may take to save
        service = Service(core, server, journal=journal, on_silence=on_silence, farewell=farewell)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, service.end, f"the controller got {number.name}")
        return await service.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m areal_jax.controller", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder, with its config.json")
    workdir = parser.parse_args().workdir
    logging.basicConfig(level=logging.INFO, format="%(asctime)s controller %(levelname)s %(message)s")
    try:
        config = configs.load(workdir)
        limit, wait = config["controller"]["disk_limit"], partial(still_starting, workdir, "controller")
        incarnation = insist(lambda: next_incarnation(workdir), limit, sleep=wait)
        core = make_core(config, incarnation, time.monotonic(), going_on=wait)
        diagnosis = asyncio.run(serve(core, config, workdir))
    except DiskFull as error:
        diagnosis = str(error)
    except (configs.ConfigError, DataError, StateError, TransportError, VerifierError) as error:
        print(f"controller: {error}", file=sys.stderr)
        return WRONG_SETTING
    if diagnosis:
        release(workdir)
        with contextlib.suppress(OSError):  # of a disk that is full even so
            print(f"controller: the run cannot go on: {diagnosis}", file=sys.stderr, flush=True)
    return CANNOT_GO_ON if diagnosis else 0


if __name__ == "__main__":
    sys.exit(main())
