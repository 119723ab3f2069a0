"""Who belongs to the run: processes say hello, speak, cannot be reached, and go; what they ran goes to others."""

from __future__ import annotations

from areal_jax.controller.fleet import Slot, Worker
from areal_jax.controller.scheduling import SUSPECT, Loss, Scheduler
from areal_jax.transport import messages as m

UNREACHED = 256  # workers that no message reaches and of which it may still be known one day whether they died


def _process(hello: m.Hello) -> tuple[int, int]:
    """What tells a process from the one before it: in containers both often have the same number."""
    return hello.pid, hello.life


class Members(Scheduler):
    """The part of `Core` that keeps the book of processes."""

    def hello(self, hello: m.Hello, now: float) -> None:
        """A role is there, or there again: then it keeps those samples that it says it runs, and loses the others."""
        self.telemetry.hello(hello, now)
        self.missing.pop(hello.name, None)
        self.send(hello.name, m.Welcome(heartbeat_seconds=self.config.heartbeat_seconds))
        if hello.role != "rollout":
            return
        if (loss := self.unreached.pop(hello.name, None)) and loss.process != _process(hello):
            self._had_died(loss)
        known = self.fleet.workers.get(hello.name)
        if known is not None and known.process != _process(hello):
            self._lose(hello.name, now, died=True, why="was started again")
            known = None
        if known is None:
            known = self.fleet.workers[hello.name] = Worker(hello.name, max(1, hello.slots), -1, _process(hello))
        if hello.version != known.version:  # weights newer than ours, or of a former life, are weights the trainer lost
            known.version = hello.version if hello.version <= self.version and not self.lives else -1
        known.updating = None
        still = {(group, i) for group, i, attempt in hello.running if self._keeps(known, group, i, attempt)}
        self._take_away(known, known.running - still, known.evaluating - still)
        strangers = {(group, sample) for group, sample, _ in hello.running} - still
        if strangers:
            self.send(hello.name, m.Cancel(tasks=sorted(strangers)))
        self._schedule(now)

    def _keeps(self, worker: Worker, group: int, sample: int, attempt: int) -> bool:
        """Whether `worker` runs this attempt, or may go on with it."""
        if group < 0:
            return self.evaluations.runs((group, sample), worker.name, attempt)
        known = self.ledger.open.get(group)
        if known is None or not 0 <= sample < len(known.samples):
            return False
        if (group, sample) not in worker.running and self.ledger.reclaim(known, sample, worker.name, attempt):
            worker.running.add((group, sample))
        return (group, sample) in worker.running and known.samples[sample].attempt == attempt

    def _take_away(self, worker: Worker, training: set[Slot], evaluating: set[Slot], claimable: bool = False) -> None:
        """`worker` does not run these (any more): they are queued again."""
        for number, i in training:
            self.ledger.unassign(self.ledger.open[number], i, claimable=claimable)
        worker.running -= training
        self.evaluations.lost(evaluating)
        worker.evaluating -= evaluating

    def unreachable(self, name: str, now: float) -> None:
        """`name` cannot be sent to: it must say hello again, and what it ran goes to others.

        One that stands still looks like this, too, once ZeroMQ gives its connection up: it is missing from now on.
        """
        party = self.telemetry.gone(name)
        if party is not None and party.role in ("rollout", "rewards"):
            self.missing[name] = party
        if name in self.fleet.workers:
            while len(self.unreached) >= UNREACHED:
                del self.unreached[next(iter(self.unreached))]
            self.unreached[name] = self._lose(name, now, died=False, claimable=True, why="does not take messages")
            self._schedule(now)

    def alive(self, role: str) -> bool:
        """Whether any process of `role` is there."""
        return any(party.role == role for party in self.telemetry.parties.values())

    def heard(self, name: str, now: float) -> None:
        """`name` has said something."""
        if party := self.telemetry.parties.get(name):
            party.heard = now

    def knows(self, name: str) -> bool:
        """Whether `name` has said hello and is not taken for dead."""
        return name in self.telemetry.parties

    def heartbeat(self, beat: m.Heartbeat, now: float) -> None:
        self.telemetry.heartbeat(beat, now)

    def goodbye(self, name: str, now: float, *, died: bool = False, reason: str = "") -> None:
        """A role ends, in good order or not: what it ran goes to others.

        One that could not be reached may still say so, as what it has sent arrives even when it is gone.
        """
        self.telemetry.gone(name)
        self.missing.pop(name, None)
        if (loss := self.unreached.pop(name, None)) and died:
            self._had_died(loss)
        if name in self.fleet.workers:
            self._lose(name, now, died=died, why=f"said goodbye ({reason})")
            self._schedule(now)

    def _lose(self, name: str, now: float, *, died: bool, why: str, claimable: bool = False) -> Loss:
        """Worker `name` is gone; its samples are queued again, and a prompt that keeps killing workers is put away."""
        worker = self.fleet.workers.pop(name)
        self.counters["workers_died" if died else "workers_left"] += 1
        self.telemetry.note(f"{name} {why}, with {worker.load} samples", now)
        groups = [self.ledger.open[number] for number in sorted({number for number, _ in worker.running})]
        loss = Loss(worker.process, groups, [group for group in groups if group.prompt.deaths >= SUSPECT])
        self._take_away(worker, set(worker.running), set(worker.evaluating), claimable)
        if died:
            self._blame(loss)
        return loss

    def _had_died(self, loss: Loss) -> None:
        """Of a worker that could not be reached it is now known that it was dead."""
        self.counters["workers_left"] = max(0, self.counters["workers_left"] - 1)  # 0: begun again meanwhile
        self.counters["workers_died"] += 1
        self._blame(loss)

    def _blame(self, loss: Loss) -> None:
        """A worker died with these on board."""
        for group in loss.groups:
            group.prompt.deaths += 1
        if len(loss.suspects) == 1:
            (group,) = loss.suspects
            group.prompt.lonely_deaths += 1
            still_open = self.ledger.open.get(group.number) is group
            if still_open and group.prompt.lonely_deaths >= self.config.max_attempts:
                self._quarantine(group, f"{group.prompt.deaths} rollout workers died while they ran it")
