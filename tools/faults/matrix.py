"""All faults that are tried."""

from __future__ import annotations

import signal

from tools.faults import stories
from tools.faults.harness import STEPS, Fault
from tools.faults.points import POINTS

TWICE = STEPS // 2  # a visit in the middle of the run, where a point is visited once per step
_VISITS = {  # a run has some 120 samples, 8 steps, 4 checkpoints, 3 evaluations
    "controller, a sample arrives": 50,
    "controller, a batch is chosen and not yet told": TWICE,
    "controller, a batch is in the journal and not yet told": TWICE,
    "controller, a version is accepted and not in the journal": TWICE,
    "controller, asked for its state (checkpoint)": 2,
    "controller, during an evaluation": 15,
    "rollout, while generating": 50,
    "rollout, an answer goes to the verifier": 50,
    "rollout, a sample is done and not sent": 50,
    "rollout, during a weight load": TWICE,
    "rollout, new weights loaded and not yet told": TWICE,
    "rollout, during an evaluation": 15,
    "rewards, a question arrives": 50,
    "rewards, judged and not yet told": 50,
    "verifier, at work on an answer": 50,
    "trainer, a batch is taken and not trained on": TWICE + 1,
    "trainer, trained and not yet published": TWICE + 1,
    "trainer, bytes written and the version not yet told": TWICE + 1,
    "trainer, waiting for a batch": TWICE + 1,
    "trainer, a checkpoint begins": 2,
    "trainer, during a checkpoint": 2,
}
POISON = "rollout, a certain prompt is begun"


def at_points() -> list[Fault]:
    """Each role is killed at each of its points; one point of each role ends it by an exception instead."""
    faults = []
    for point, where in POINTS.items():
        if point == POISON:
            continue
        verifier = point.startswith("verifier")
        faults.append(
            Fault(
                role="verifier" if verifier else where.role,
                action="kill verifier" if verifier else "kill",
                point=point,
                visit=_VISITS.get(point, 1),
                restarts=0 if verifier else 1,
            )
        )
    for point in (
        "controller, a sample arrives", "rollout, during a weight load", "rewards, judged and not yet told",
        "trainer, trained and not yet published",
    ):  # fmt: skip
        faults.append(Fault(role=POINTS[point].role, action="raise", point=point, visit=_VISITS[point], restarts=None))
    for point in (
        "controller, before the first weights", "rollout, while generating", "rollout, during a weight load",
        "rollout, during an evaluation", "trainer, a batch is taken and not trained on", "trainer, during a checkpoint",
    ):  # fmt: skip
        visit = _VISITS.get(point, 1)
        faults.append(
            Fault(role="launcher", action="kill parent", point=point, visit=visit, launcher_dies=True, restarts=None)
        )
    # Two deaths to come under suspicion, and `controller.max_attempts` of its own.
    faults.append(Fault(role="rollout", action="kill every time", point=POISON, quarantined=1, restarts=5))
    return faults


def frozen() -> list[Fault]:
    """SIGSTOP for longer than the heartbeat limit of 6 seconds: for a while, or for good."""
    faults = [
        Fault(role=role, action="stop for 9 s", story=stories.frozen(role, 9.0), what="at a random moment",
              restarts=None, random=True)
        for role in ("controller", "rollout", "rewards", "trainer", "launcher")
    ]
    for point in (
        "controller, a batch is chosen and not yet told", "rollout, while generating", "rollout, during a weight load",
        "rewards, a question arrives",
    ):  # fmt: skip
        faults.append(Fault(role=POINTS[point].role, action="hang", point=point, visit=_VISITS[point]))
    early = {"settings": {"launch.announce_limit": 15.0}, "restarts": None}  # others may give up waiting for it
    faults.append(Fault(role="controller", action="hang", point="controller, before it can be found", **early))
    return faults


def from_outside() -> list[Fault]:
    """Random deaths, networks, ports, slow verifiers, guests."""
    roles = ("controller", "rollout", "rewards", "verifier", "trainer", "launcher")
    faults = [
        Fault(
            role=role, action="kill", story=stories.at_random(role), what="at a random moment",
            random=True, launcher_dies=role == "launcher", restarts=0 if role in ("verifier", "launcher") else 1,
        )
        for role in roles
    ]  # fmt: skip
    faults += [
        Fault(role="guardian", action="kill", story=stories.guardian_dies(False), random=True,
              what="at a random moment"),
        Fault(role="guardian", action="kill", story=stories.guardian_dies(True), random=True, launcher_dies=True,
              what="at a random moment, and the launcher once there is another"),
    ]  # fmt: skip
    for server in ("controller", "rewards-0"):
        for how in ("dropped", "delayed"):
            what = f"messages between {server} and its clients are {how} again and again"
            faults.append(
                Fault(role=server.partition("-")[0], action="network", story=stories.bad_network(server, how),
                      what=what, restarts=None, random=True)
            )  # fmt: skip
    slow = {"rewards.verifiers": ["tools.faults.stories:slow"], "rewards.timeout": 1.0, "rewards.processes": 4}
    faults += [
        Fault(
            role="rewards", action="slow", story=stories.failed("verifier_timeout"),
            what="every answer takes long, some for ever", settings=slow, restarts=0,
        ),
        Fault(
            role="controller", action="port taken", story=stories.nothing, what="from the start",
            settings={"controller.address": f"tcp://127.0.0.1:{stories.taken_port()}"},
            fails="choose another port", restarts=None,
        ),
        Fault(role="controller", action="port taken", story=stories.port_is_gone, what="while it is being restarted",
              random=True),
    ]  # fmt: skip
    faults.append(
        Fault(
            role="trainer", action="guard", story=stories.nothing, what="an update beyond its limit, told to stop",
            settings={"trainer.guard": "stop", "trainer.grad_norm_limit": 1e-9}, fails="its batch is in ",
        )
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGKILL):
        faults.append(
            Fault(
                role="rollout", action="guest", story=stories.comes_and_goes(number),
                what=f"one more is started by hand, and ended by {number.name} at work",
                settings={"rewards.verifiers": ["tools.faults.stories:unhurried"]}, restarts=None,
            )
        )  # fmt: skip
    return faults


def disks() -> list[Fault]:
    """A file system of the run's own that is filled to the last byte. Needs the right to mount one."""
    common: dict = {"role": "controller", "action": "disk full", "disk": 64 << 20, "restarts": 0}
    trainers = common | {"role": "trainer", "logs_apart": True}
    return [
        Fault(**common, story=stories.full_disk(5.0), what="for a while: all wait"),
        Fault(
            **common, story=stories.full_disk(None), what="for longer than the limit, then there is room again",
            settings={"controller.disk_limit": 5.0}, ends="cannot be written: No space left on device; tried for",
        ),
        Fault(
            **trainers, point="trainer, trained and not yet published", visit=TWICE,
            what="which goes over the disk: all wait", story=stories.room_again(5.0, r"/weights/\S+ cannot be written"),
            settings={"trainer.weights_transport": "disk"},
        ),
        Fault(
            **trainers, point="trainer, a checkpoint begins", visit=2,
            what="of two processes, then there is room again", story=stories.room_again(5.0, "RESOURCE_EXHAUSTED"),
            settings={"trainer.processes": 2}, ends="the checkpoint of version 4 could not be written",
        ),
    ]  # fmt: skip


def all_faults() -> list[Fault]:
    return [*at_points(), *frozen(), *from_outside(), *disks()]
