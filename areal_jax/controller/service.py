"""The controller on the network: messages in, the core's decisions out. It decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from areal_jax.controller.core import Core, Send, Silent, Stop
from areal_jax.controller.journal import Journal
from areal_jax.disk import RETRY_SECONDS, DiskFull, Waiting
from areal_jax.transport import messages as m
from areal_jax.transport.options import TURN
from areal_jax.transport.sockets import HELLO_FIRST, Peer, Server

log = logging.getLogger(__name__)
LONG_POLL = 1.0  # seconds a request may wait for its answer before `NotReady`
JOURNAL_EVERY = 1.0  # seconds of work that a killed controller may cost
LAST_WORDS = 5.0  # seconds after the end in which others still get answers


class Service:
    """Runs `core` behind `server` until the run is over, has failed, or `end` is called.

    With a `journal`, what must survive this process is written before anyone is told. GetBatch and Evaluate are held
    for a second, and answered at once when there is something. `on_silence` is told of processes that hang. `farewell`:
    seconds after being told to end in which a trainer may still fetch the state for its last checkpoint.

    When the journal cannot be written (a full disk), nobody is told anything that it would have to hold: the trainer
    gets NotReady, no batch leaves, and so the staleness gate closes. It is tried again and again, for
    `controller.disk_limit` seconds; then the run ends with a diagnosis.
    """

    def __init__(
        self,
        core: Core,
        server: Server,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
        on_silence: Callable[[Silent], None] = lambda silent: None,
        farewell: float = 60.0,
    ):
        self._on_silence, self._farewell = on_silence, farewell
        self.core, self.server, self._clock, self._journal = core, server, clock, journal
        self._journaled_at, self._dirty = clock(), False
        self._disk, self._tried_at = Waiting(core.config.disk_limit), 0.0
        self._unsaid: list[Silent] = []  # that could not be written down yet
        self._say_at = 0.0  # when that is tried again
        self._restored: m.SetState | None = None  # what the core goes on from, while it could not be written down
        self._peers: dict[str, Peer] = {}  # where each role is reached
        self._names: dict[Peer, str] = {}
        self._replaced: deque[Peer] = deque(maxlen=256)  # rollout workers whose name another process has taken
        self._waiting: list[tuple[Peer, m.Message, float]] = []
        self._end_at: float | None = None
        self._stay_until = 0.0  # if there is a trainer
        self._ended = asyncio.Event()

    async def run(self) -> str | None:
        """Serve until the end. Returns None when all went well, else the diagnosis."""
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._tick())]
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in (*tasks, ended):
                task.cancel()
        if self.core.finished and self._journal is not None:
            self._journal.remove()
        return self.core.stopped

    def end(self, reason: str) -> None:
        """Tell everybody to end, then return from `run` soon, but after the trainer.

        Whoever ends a whole run tells all its processes at once, and the trainer may be in the middle of a step.
        """
        if self._end_at is None:
            self.core.shutdown(reason)
            now = self._clock()
            self._end_at, self._stay_until = now + 0.5, now + self._farewell

    async def _receive(self) -> None:
        """Handles what has arrived, then acts on it once: samples that end together are reported together."""
        received = await self.server.receive()
        while received is not None:
            for _ in range(TURN):
                peer, message = received
                if isinstance(message, m.Hello):
                    await self._act()  # what was decided before is for who had the name before
                reply = self._handle(peer, message)
                if reply is not None:
                    await self.server.send(peer, reply)
                if (received := await self.server.receive(wait=False)) is None:
                    break
            await self._act()
            await asyncio.sleep(0)
            received = received or await self.server.receive()

    async def _tick(self) -> None:
        period = min(0.25, self.core.config.heartbeat_seconds / 2)
        last = self._clock()
        while True:
            await asyncio.sleep(period)
            now = self._clock()
            if (late := now - last - period) > self.core.config.heartbeat_limit / 4:  # stopped, or short of everything
                self.core.overslept(late, now)
            last = now
            if self._disk.problem or self.core.trainer_without_room():
                self.core.held_up(now)
            self.core.tick(now)
            await self._act()
            if now < self._stay_until and self.core.alive("trainer"):
                continue
            if self._end_at is not None and (now >= self._end_at or not self.core.alive("rollout")):
                self._ended.set()

    # --- Messages --------------------------------------------------------------------------------------------------

    def _handle(self, peer: Peer, message: m.AnyMessage) -> m.Message | None:
        now, core = self._clock(), self.core
        match message:
            case m.Hello():
                return self._hello(peer, message, now)
            case m.Heartbeat() | m.Goodbye() | m.SampleDone() | m.SampleFailed() | m.WeightsLoaded():
                known = core.knows(message.name) or isinstance(message, m.Goodbye)  # which needs no other word first
                if self._names.get(peer) != message.name or not known:
                    if peer in self._replaced:
                        return m.Shutdown(reason=f"another process has taken the name {message.name}")
                    return m.Refused(reason=HELLO_FIRST)
                self._from_role(message, now)
                return None
            case m.GetBatch() | m.Evaluate():
                core.heard(peer.name, now)
                reply = self._ask(message, now)
                if isinstance(reply, m.NotReady):
                    self._waiting = [entry for entry in self._waiting if entry[0] != peer]
                    self._waiting.append((peer, message, now + LONG_POLL))
                    return None
                return reply
            case m.Publish():
                core.heard(peer.name, now)
                self._restored = None
                return self._once_written(core.publish(message.manifest, now), now)
            case m.GetState():
                return core.get_state(message.version)
            case m.SetState():
                return self._set_state(message, now)
            case m.GetStatus():
                return m.Status(data=core.status(now) | self._sockets() | {"disk": self._disk.problem})
            case m.Finish():
                report = core.finish(now) | self._sockets()
                self._end_at = self._end_at or now + LAST_WORDS
                self._write_journal(now)  # which goes last of all: until then another may have to answer this again
                return m.Status(data=report)
        return m.Refused(reason=f"the controller does not take {type(message).__name__}")

    def _sockets(self) -> dict[str, Any]:
        return {
            "refused": dict(self.server.guard.refused),
            "refused_by_peer": self.server.guard.refused_by_peer(),
            "unauthenticated": self.server.unauthenticated,
            "undelivered": self.server.undelivered,
        }

    def _hello(self, peer: Peer, hello: m.Hello, now: float) -> m.Message | None:
        if hello.protocol != m.PROTOCOL:
            return m.Refused(reason=f"protocol {hello.protocol}, this controller speaks {m.PROTOCOL}: update one side")
        old = self._peers.get(hello.name)
        if old is not None and old != peer:
            self._names.pop(old, None)
            if hello.role == "rollout":
                self._replaced.append(old)
        self._peers[hello.name] = peer
        self._names[peer] = hello.name
        self.core.hello(hello, now)
        return None

    def _from_role(self, message: m.AnyMessage, now: float) -> None:
        core = self.core
        core.heard(message.name, now)
        match message:
            case m.Heartbeat():
                core.heartbeat(message, now)
            case m.SampleDone():
                core.sample_done(message, now)
            case m.SampleFailed():
                core.sample_failed(message, now)
            case m.WeightsLoaded():
                core.weights_loaded(message, now)
            case m.Goodbye():
                core.goodbye(message.name, now, died=message.died, reason=message.reason)
                self._names.pop(self._peers.pop(message.name), None)

    def _ask(self, message: m.GetBatch | m.Evaluate, now: float) -> m.Message:
        if isinstance(message, m.GetBatch):
            fresh = message.version not in self.core.handed
            reply = self.core.get_batch(message.version, now)
            if isinstance(reply, m.Batch) and (fresh or self._disk.problem):
                return self._once_written(reply, now)
        else:
            reply = self.core.evaluate(message.version, now)
        if isinstance(reply, m.NotReady) and self._disk.problem:
            return m.NotReady(waiting_for=reply.waiting_for, disk=True)
        return reply

    async def _act(self) -> None:
        """Carry out what the core has decided, and answer the requests that can be answered now."""
        now = self._clock()
        waiting, self._waiting = self._waiting, []
        for peer, message, deadline in waiting:
            if now < deadline and not self.core.changed:
                self._waiting.append((peer, message, deadline))
                continue
            reply = self._ask(message, now)
            if isinstance(reply, m.NotReady) and now < deadline:
                self._waiting.append((peer, message, deadline))
            else:
                await self.server.send(peer, reply)
        self._dirty |= self.core.changed
        self.core.changed = False
        self._spool(now)
        if self._dirty and now - self._journaled_at > JOURNAL_EVERY:
            self._write_journal(now)
        while actions := self.core.take_actions():
            for action in merged(actions):
                if isinstance(action, Stop):
                    self._end_at = self._end_at or now + LAST_WORDS
                elif isinstance(action, Silent):
                    self._unsaid.append(action)
                elif isinstance(action, Send):
                    await self._send(action, now)
        self._report_silence(now)

    def _report_silence(self, now: float) -> None:
        """Report who hangs, but not who came back before it could be written down; the run can do without for long."""
        self._unsaid = [silent for silent in self._unsaid if not self.core.knows(silent.name)]
        if now < self._say_at:
            return
        try:
            while self._unsaid:
                self._on_silence(self._unsaid[0])
                self._unsaid.pop(0)
        except OSError as error:
            if not self._say_at:
                self._note(f"that {self._unsaid[0].name} is silent cannot be written down: {error}", now)
            self._say_at = now + RETRY_SECONDS
        else:
            self._say_at = 0.0

    # --- What must survive this process -----------------------------------------------------------------------------

    def _set_state(self, message: m.SetState, now: float) -> m.Message:
        """Go on from the state in `message`, once: asked again because of a full disk, only writing is tried again."""
        reply = m.Published(version=message.version)
        if message != self._restored:
            reply = self.core.set_state(message, now)
        reply = self._once_written(reply, now)
        self._restored = message if isinstance(reply, m.NotReady) else None
        return reply

    def _once_written(self, reply: m.Message, now: float) -> m.Message:
        """`reply`, if it may be told."""
        if self._write_journal(now) or isinstance(reply, m.Refused):
            return reply
        return m.NotReady(waiting_for=f"room on the disk: {self._disk.problem}", disk=True)

    def _write_journal(self, now: float) -> bool:
        done = self._spool(now) and (self._journal is None or self._try(lambda: self._journal.write(self.core), now))
        self._journaled_at, self._dirty = now, not done
        if done and self._disk.succeeded():
            self._note("the disk takes writes again", now)
        return done

    def _spool(self, now: float) -> bool:
        finished = self.core.just_finished
        while finished:
            if self._journal is not None and not self._try(lambda: self._journal.spool(finished[0]), now):
                return False
            finished.pop(0)
        return True

    def _try(self, write: Callable[[], None], now: float) -> bool:
        """Whether `write` went well; not too often while the disk is full, and at last the end of the run."""
        if self._disk.problem and now - self._tried_at < RETRY_SECONDS:
            return False
        try:
            write()
        except OSError as error:
            self._tried_at = now
            try:
                if self._disk.failed(error, now):
                    self._note(f"{self._disk.problem}; trying again for {self.core.config.disk_limit:.0f} s", now)
            except DiskFull as full:
                if not self.core.finished:
                    self.core.stop(str(full))
            return False
        return True

    def _note(self, text: str, now: float) -> None:
        log.warning("%s", text)
        self.core.telemetry.note(text, now)

    async def _send(self, action: Send, now: float) -> None:
        peer = self._peers.get(action.to)
        if peer is not None and not await self.server.send(Peer(peer.identity), action.message):
            self.core.unreachable(action.to, now)


def merged(actions: Iterable[Send | Stop | Silent]) -> list[Send | Stop | Silent]:
    """`actions` with the tasks of one worker in as few messages as can be; what is sent to each keeps its order."""
    kept, last = [], {}  # last: of each name, the place of its last message
    for action in actions:
        if isinstance(action, Send):
            place = last.get(action.to)
            if place is not None and isinstance(action.message, m.Assign):
                before = kept[place].message
                if isinstance(before, m.Assign):
                    kept[place] = Send(action.to, m.Assign(tasks=[*before.tasks, *action.message.tasks]))
                    continue
            last[action.to] = len(kept)
        kept.append(action)
    return kept
