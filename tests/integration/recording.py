"""A role of a run that also writes down what it really did; started in place of the role's own program.

    python tests/integration/recording.py trainer|rollout ARGUMENTS

The rollout worker appends every completion that its engine gives to WORKDIR/recorded/completions.jsonl; the trainer
writes the packed arrays of every step, as they went to the devices, to WORKDIR/recorded/step-N.npz.

HOLD_EVALUATIONS="3 6" in the environment: of the first evaluation with one of these versions, one completion is held
back until a completion for training has tokens of a newer version, so that this evaluation lasts as long as that takes.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

HOLD_SECONDS = 60.0


async def hold(key: tuple, version: int, folder: Path) -> None:
    """Return when the completion `key` of an evaluation may be given out; `TimeoutError` when nothing newer comes."""
    if str(version) not in os.environ.get("HOLD_EVALUATIONS", "").split():
        return
    try:
        (folder / "held").touch(exist_ok=False)  # by one worker, once
    except FileExistsError:
        return

    def newer(line: dict) -> bool:
        return line["key"][1] >= 0 and max(line["versions"]) > version

    deadline = time.monotonic() + HOLD_SECONDS
    while not any(newer(json.loads(line)) for line in (folder / "completions.jsonl").read_text().splitlines()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no training beside the evaluation of version {version}, of which {key} is held")
        await asyncio.sleep(0.05)


def record_rollout(folder: Path):
    from areal_jax.rollout import __main__ as role

    make_engine = role.make_engine

    def recording(*arguments, **settings):
        engine = make_engine(*arguments, **settings)
        generate = engine.generate

        async def recorded(request):
            completion = await generate(request)
            columns = {name: getattr(completion, name).tolist() for name in ("tokens", "logprobs", "versions")}
            line = {"key": request.key, "prompt": request.tokens.tolist(), **columns}
            if request.key[1] < 0:
                await hold(request.key, line["versions"][0], folder)
            with (folder / "completions.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            return completion

        engine.generate = recorded
        return engine

    role.make_engine = recording
    return role.main


def record_trainer(folder: Path):
    from areal_jax.trainer import __main__ as role
    from areal_jax.trainer.learner import Learner

    step = Learner.step

    def recorded(self, batch, **options):
        pending = step(self, batch, **options)
        names = pending.packed[0].arrays
        np.savez(
            folder / f"step-{batch.version}.npz",
            **{name: np.concatenate([packed.arrays[name] for packed in pending.packed]) for name in names},
        )
        return pending

    Learner.step = recorded
    return role.main


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    folder = Path(sys.argv[sys.argv.index("--workdir") + 1]) / "recorded"
    folder.mkdir(exist_ok=True)
    sys.exit({"rollout": record_rollout, "trainer": record_trainer}[kind](folder)())
