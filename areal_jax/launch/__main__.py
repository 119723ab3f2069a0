"""Starts a run: python -m areal_jax.launch --config=configs/quickstart.py --workdir=runs/x [--config.trainer.steps=20]

  --config=FILE          Python file with get_config(); the settings are in docs/config.md
  --config.KEY=VALUE     change one setting, e.g. --config.controller.max_staleness=0
  --workdir=DIR          the run's folder; the same folder and settings again go on with that run
  --dry_run              check everything, start nothing, write nothing
  --prepare              check everything and write the run's folder, for what is started elsewhere (Slurm)
  --nodes=N              the run is on so many nodes of a cluster
  --node=I               with --nodes: start node I's part of the prepared run in --workdir; node 0 has the controller

Everything is checked before any process starts. Exit codes: 0 finished, 1 failed, 2 something is wrong with the
settings (one line says what), 130 stopped by a signal (the same command goes on from the checkpoint).
"""

from __future__ import annotations

import functools
import os
import sys

from areal_jax.config import ConfigError
from areal_jax.launch import command_line


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing: nothing here needs it
    try:
        command = command_line.parse(arguments)
        if command is None:
            print(__doc__)
            return 0
        if command.workdir is None and not command.dry_run:
            raise ConfigError("no folder for the run: give --workdir=runs/NAME")
        from areal_jax.launch import session
        from areal_jax.launch.validate import validate

        if command.config is None:
            return session.run_node(command.workdir, command.node, command.nodes)
        said = functools.partial(print, "areal_jax:", flush=True)
        nodes = command.nodes or (0 if command.prepare else 1)
        config = validate(command.config, said, here=not command.prepare, nodes=nodes)
        if command.dry_run:
            print(f"areal_jax: '{config['name']}' can start")
            return 0
        session.prepare(config, command.workdir)
    except ConfigError as error:
        print(f"areal_jax: error: {error}", file=sys.stderr)
        return 2
    if command.prepare:
        print(f"areal_jax: {command.workdir} is prepared")
        return 0
    return session.run(config, command.workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
