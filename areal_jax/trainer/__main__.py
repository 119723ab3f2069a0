"""One trainer process: `python -m areal_jax.trainer --workdir DIR [--process i]`.

Exit codes: 0 the run is finished; 75 it was told to stop and has saved a checkpoint (start it again to go on); 70 it
cannot go on, for a reason that another start would meet again; 1 an error of any other kind; 2 a setting is wrong. The
end of the output says what it was.
"""

import argparse
import contextlib
import logging
import signal
import sys

from areal_jax.exits import CANNOT_GO_ON, TOLD_TO_STOP, WRONG_SETTING


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m areal_jax.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="the run's folder, with config.json")
    parser.add_argument("--process", type=int, default=0, help="JAX process index")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Orbax's writers, whose failures `Checkpoints` has already told; theirs would come after this program's last line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stop.append(received))

    from areal_jax.config import ConfigError, load, section
    from areal_jax.controller.config import ControllerConfig
    from areal_jax.disk import DiskFull, release
    from areal_jax.metrics.config import MetricsConfig
    from areal_jax.rollout.config import RolloutConfig
    from areal_jax.trainer import distributed
    from areal_jax.trainer.config import TrainerConfig
    from areal_jax.transport.errors import TransportError

    try:
        config = load(options.workdir)
        trainer = section(TrainerConfig, config["trainer"])
        distributed.start(options.workdir, options.process, trainer.processes, config["controller"]["address"])
        # jax may only be used from here on.
        from areal_jax.models import ModelError
        from areal_jax.trainer.batch import StalenessError
        from areal_jax.trainer.checkpoint import CheckpointError
        from areal_jax.trainer.guards import TrainingStopped
        from areal_jax.trainer.link import WaitedTooLong
        from areal_jax.trainer.loop import Settings, Training
        from areal_jax.trainer.objectives import ObjectiveError

        settings = Settings(
            name=config["name"],
            model=config["model"],
            evaluates=bool(config["data"]["eval"]),
            trainer=trainer,
            controller=section(ControllerConfig, config["controller"]),
            rollout=section(RolloutConfig, config["rollout"]),
            metrics=section(MetricsConfig, config["metrics"]),
            config=config,
        )
        try:
            finished = Training(settings, options.workdir, options.process, lambda: bool(stop)).run()
        except ObjectiveError as error:
            raise ConfigError(str(error)) from error
        except (TrainingStopped, WaitedTooLong, StalenessError, CheckpointError, ModelError, DiskFull) as error:
            if isinstance(error, DiskFull | CheckpointError):  # of which a full disk is one cause
                release(options.workdir)
            with contextlib.suppress(OSError):  # of a disk that is full even so
                print(f"areal_jax.trainer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return CANNOT_GO_ON
    except TransportError as error:  # who did not answer may next time
        print(f"areal_jax.trainer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except ConfigError as error:
        print(f"areal_jax.trainer: error: {error}", file=sys.stderr)
        return WRONG_SETTING
    return 0 if finished else TOLD_TO_STOP


if __name__ == "__main__":
    sys.exit(main())
