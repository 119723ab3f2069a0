"""The worker's side of the reward services: every question gets an answer or a named failure within a bounded time."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from areal_jax.rollout.session import VerificationFailed
from areal_jax.transport.errors import TransportError
from areal_jax.transport.messages import AnyMessage, Message, Score, Verify, VerifyFailed

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at the connections while an answer is awaited


class Connection(Protocol):
    """One reward service; `transport.client.Client` is one."""

    server: str
    disconnected_for: float

    async def send(self, message: Message) -> None: ...
    async def receive(self) -> AnyMessage | None: ...
    def close(self) -> None: ...


@dataclasses.dataclass
class _Question:
    message: Verify
    answer: asyncio.Future
    asked: dict[int, int]  # services that have been sent it, and which of their connections it was
    since: float


class RewardClients:
    """Asks the least busy reward service, and again, or another one, when the connection is lost or nothing is heard.

    A question may be asked more than once (verifiers are functions of their arguments); the first answer counts. One
    that waits behind others is not unanswered: services judge in turn, so that it waits for as long as its service
    answers any question, and is put to the same one again (which is free if it has it still).

    Args:
      services: connections, opened here.
      patience: seconds without any answer after which a question is put to another service as well (or to the same
        again); where its connection was lost, and there is one again, that happens at once.
      limit: seconds without any answer after which it fails as "verifier_unreachable" or "verifier_silent".
    """

    def __init__(
        self,
        services: Sequence[Connection],
        *,
        patience: float,
        limit: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.patience, self.limit, self._clock = patience, limit, clock
        self.counts: Counter[str] = Counter()
        self._services = list(services)
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._busy = [0] * len(self._services)
        self._losses = [0] * len(self._services)  # how often each connection was lost
        self._gone = [False] * len(self._services)
        self._heard = [float("-inf")] * len(self._services)  # when each sent its last answer
        self._readers: list[asyncio.Task] = []

    async def verify(
        self, record: dict, prompt: str, completion: str, prompt_tokens: list[int], completion_tokens: list[int]
    ) -> Score:
        """The score of a completion; raises `VerificationFailed` with the failure's name."""
        if not self._readers:
            self._readers = [asyncio.create_task(self._read(i)) for i in range(len(self._services))]
        number = next(self._numbers)
        message = Verify(
            request=number, record=record, prompt=prompt, completion=completion,
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        )  # fmt: skip
        question = _Question(message, asyncio.get_running_loop().create_future(), {}, self._clock())
        self._questions[number] = question
        self.counts["verifications"] += 1
        try:
            await self._ask(question)
            while not await self._answered(question):
                self.counts["verifications_repeated"] += 1
                await self._ask(question)
            return question.answer.result()
        except TimeoutError:
            self.counts["verifications_unanswered"] += 1
            gone = all(service.disconnected_for for service in self._services)
            raise VerificationFailed(
                "verifier_unreachable" if gone else "verifier_silent",
                f"{', '.join(s.server for s in self._services)}: no answer to any question for {self.limit:g} s",
            ) from None
        finally:
            del self._questions[number]
            for i in question.asked:
                self._busy[i] -= 1

    @property
    def lost(self) -> int:
        """How many connections were found lost so far."""
        return sum(self._losses)

    async def _answered(self, question: _Question) -> bool:
        """Waits for the answer; False when it is time to ask again. Raises `TimeoutError` after `limit`."""
        asked = self._clock()
        while not question.answer.done():
            await asyncio.wait([question.answer], timeout=min(self.patience, self.limit, _LOOK))
            self._look()
            now, heard = self._clock(), max(question.since, *(self._heard[i] for i in question.asked))
            lost = all(self._losses[i] > losses for i, losses in question.asked.items())
            if not question.answer.done() and now - heard > self.limit:
                raise TimeoutError
            if (lost and not all(self._gone)) or now - asked > self.patience:
                return question.answer.done()
        return True

    def _look(self) -> None:
        for i, service in enumerate(self._services):
            gone = service.disconnected_for > 0
            self._losses[i] += gone and not self._gone[i]
            self._gone[i] = gone

    async def _ask(self, question: _Question) -> None:
        """Sends the question to a service that has it and answers others, or else to the one that is connected, has not
        had it yet, and has the least to do."""
        answering = [i for i in question.asked if self._clock() - self._heard[i] <= self.patience and not self._gone[i]]

        def cost(i: int) -> tuple[bool, bool, int]:
            return self._services[i].disconnected_for > 0, i in question.asked, self._busy[i]

        i = min(answering or range(len(self._services)), key=cost)
        self._busy[i] += i not in question.asked
        question.asked[i] = self._losses[i]
        try:
            await self._services[i].send(question.message)
        except TransportError as error:  # it will be asked again
            log.warning("verification not sent: %s", error)

    async def _read(self, i: int) -> None:
        while True:
            try:
                message = await self._services[i].receive()
            except TransportError as error:
                log.warning("reward service %s: %s", self._services[i].server, error)
                await asyncio.sleep(1.0)  # it has not announced itself in time; look again
                continue
            if message is None:
                return
            self._heard[i] = self._clock()
            question = self._questions.get(getattr(message, "request", 0))
            if question is None or question.answer.done():
                self.counts["late_answers"] += 1
            elif isinstance(message, Score):
                question.answer.set_result(message)
            elif isinstance(message, VerifyFailed):
                name = message.error if message.error.startswith("verifier") else f"verifier_{message.error}"
                question.answer.set_exception(VerificationFailed(name, message.detail))

    def close(self) -> None:
        """Let go of the services."""
        for task in self._readers:
            task.cancel()
        for service in self._services:
            service.close()
