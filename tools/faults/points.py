"""Starts a role of a run that meets a fault at a chosen point of its own code.

    python -m tools.faults.points SPEC MODULE ARGUMENTS        # as `python -m MODULE ARGUMENTS`, with the fault of SPEC

SPEC is JSON: the point's name, the action, on which visit of the point, and the file that says that it has happened
(so that it happens in one process of the run only).
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A function of a role: the fault comes when it is called, or when it has returned (`after`, not for async)."""

    role: str
    where: str  # "module:Class.function"
    after: bool = False
    when: Callable[..., bool] = lambda *_: True  # which calls count, by their arguments (and, if `after`, the result)


def _is(name: str, place: int = 1) -> Callable[..., bool]:
    return lambda *arguments: type(arguments[place]).__name__ == name


def _trains(_worker, task, *_) -> bool:
    return not task.evaluation


def _poisoned(_worker, task, *_) -> bool:
    return not task.evaluation and task.record["prompt"] == POISONED


def _evaluates(_worker, task, *_) -> bool:
    return task.evaluation


POISONED = "1+5+9+6?"  # a prompt of the tiny run's data
_CORE = "areal_jax.controller.core:Core"
_SERVICE = "areal_jax.controller.service:Service"
_WORKER = "areal_jax.rollout.worker:Worker"
_LOOP = "areal_jax.trainer.loop:Training"
POINTS = {
    "controller, before the first weights": Point("controller", f"{_CORE}.publish"),
    "controller, before it can be found": Point("controller", "areal_jax.controller.journal:Journal.recover"),
    "controller, a sample arrives": Point("controller", f"{_CORE}.sample_done"),
    "controller, a batch is chosen and not yet told": Point(
        "controller", f"{_CORE}.get_batch", after=True, when=lambda *a: type(a[-1]).__name__ == "Batch"
    ),
    "controller, a batch is in the journal and not yet told": Point(
        "controller", f"{_SERVICE}._ask", after=True, when=lambda *a: type(a[-1]).__name__ == "Batch"
    ),
    "controller, a version is accepted and not in the journal": Point("controller", f"{_CORE}.publish", after=True),
    "controller, asked for its state (checkpoint)": Point("controller", f"{_CORE}.get_state"),
    "controller, during an evaluation": Point("controller", "areal_jax.controller.evaluation:Evaluations.done"),
    "controller, told that the run is over": Point("controller", f"{_CORE}.finish"),
    "controller, the report is made and not yet sent": Point("controller", f"{_CORE}.finish", after=True),
    "rollout, before the first weights": Point("rollout", f"{_WORKER}._load"),
    "rollout, while generating": Point("rollout", f"{_WORKER}._begin", after=True, when=_trains),
    "rollout, an answer goes to the verifier": Point("rollout", "areal_jax.rollout.verification:RewardClients._ask"),
    "rollout, a sample is done and not sent": Point("rollout", f"{_WORKER}._send", when=_is("SampleDone")),
    "rollout, during a weight load": Point("rollout", "areal_jax.rollout.jax_engine:JaxEngine.update_weights"),
    "rollout, new weights loaded and not yet told": Point("rollout", f"{_WORKER}._send", when=_is("WeightsLoaded")),
    "rollout, a certain prompt is begun": Point("rollout", f"{_WORKER}._begin", after=True, when=_poisoned),
    "rollout, during an evaluation": Point("rollout", f"{_WORKER}._begin", after=True, when=_evaluates),
    "rewards, before it is ready": Point("rewards", "areal_jax.rewards.pool:VerifierPool.__aenter__"),
    "rewards, a question arrives": Point("rewards", "areal_jax.rewards.service:RewardService._answer"),
    "rewards, judged and not yet told": Point("rewards", "areal_jax.rewards.service:RewardService._count"),
    "verifier, at work on an answer": Point("rewards", "areal_jax.rewards.process:WorkerProcess._send", after=True),
    "trainer, before the first weights": Point("trainer", "areal_jax.trainer.link:BackgroundPublisher.publish"),
    "trainer, a batch is taken and not trained on": Point("trainer", f"{_LOOP}.step"),
    "trainer, trained and not yet published": Point("trainer", "areal_jax.trainer.link:BackgroundPublisher.start"),
    "trainer, bytes written and the version not yet told": Point(
        "trainer", "areal_jax.weights.publisher:Publisher.publish", after=True
    ),
    "trainer, waiting for a batch": Point("trainer", "areal_jax.trainer.link:Link.batch"),
    "trainer, a checkpoint begins": Point("trainer", "areal_jax.trainer.checkpoint:Checkpoints.save"),
    "trainer, during a checkpoint": Point("trainer", "areal_jax.trainer.checkpoint:Checkpoints.save", after=True),
    "trainer, waiting for an evaluation": Point("trainer", f"{_LOOP}.evaluate"),
    "trainer, at the export": Point("trainer", "areal_jax.models:export_hf"),
}


def arm(point: Point, action: Callable[[], None], visit: int) -> None:
    """Let `action` happen on visit number `visit` of `point`, and on every later one."""
    module, _, path = point.where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    inner, visits = getattr(owner, name), 0

    @functools.wraps(inner)
    def outer(*arguments, **named):
        nonlocal visits
        result = inner(*arguments, **named) if point.after else None
        if point.when(*arguments, *([result] if point.after else [])):
            visits += 1
            if visits >= visit:
                action()
        return result if point.after else inner(*arguments, **named)

    setattr(owner, name, outer)


def fill(path: str | os.PathLike) -> None:
    """Let a file take what its disk has left, to the last byte."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as ballast:
        while ballast.write(bytes(1 << 16)):
            pass


class Fault:
    """What happens at the point. Actions: "kill", "raise", "stop" (for `seconds`), "hang", "sleep" (for `seconds`),
    "kill parent", "kill verifier", "disk full"; "kill every time" knows no first time."""

    def __init__(self, spec: dict[str, Any]):
        self._spec = spec

    def __call__(self) -> None:
        if self._spec["action"] == "kill every time":
            open(self._spec["fired"], "a").close()
            self._kill()
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._spec["fired"], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            getattr(self, "_" + self._spec["action"].replace(" ", "_"))()

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _raise(self) -> None:
        raise RuntimeError(f"a fault was put here: {self._spec['point']}")

    def _hang(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _stop(self) -> None:
        wake = f"sleep {self._spec['seconds']}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake], stdin=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _sleep(self) -> None:
        time.sleep(self._spec["seconds"])

    def _kill_parent(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    def _disk_full(self) -> None:
        fill(self._spec["ballast"])

    def _kill_verifier(self) -> None:
        import psutil

        for child in psutil.Process().children():
            if "areal_jax.rewards.worker" in " ".join(child.cmdline()):
                child.kill()


def main() -> None:
    spec, module = json.loads(sys.argv[1]), sys.argv[2]
    arm(POINTS[spec["point"]], Fault(spec), spec["visit"])
    sys.argv[:] = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
