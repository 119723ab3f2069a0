"""Which reward service is asked, when it is asked again, and when a question is given up; without sockets."""

import asyncio

import pytest

from areal_jax.rollout import verification
from areal_jax.rollout.session import VerificationFailed
from areal_jax.transport.messages import Score


class Service:
    """A connection whose other end is the test."""

    def __init__(self, server):
        self.server, self.disconnected_for = server, 0.0
        self.questions, self.answers = asyncio.Queue(), asyncio.Queue()

    async def send(self, message):
        self.questions.put_nowait(message.request)

    async def receive(self):
        return await self.answers.get()

    def close(self):
        pass


def test_a_question_that_waits_behind_others_is_neither_given_up_nor_put_to_a_second_service(monkeypatch):
    """As with a slow verifier and many samples at once: only a service that answers nothing is silent."""
    monkeypatch.setattr(verification, "_LOOK", 0.001)
    now = 0.0

    async def body():
        nonlocal now
        services = [Service("rewards-0"), Service("rewards-1")]
        clients = verification.RewardClients(services, patience=10.0, limit=50.0, clock=lambda: now)
        waiting = asyncio.create_task(clients.verify({}, "", "", [], []))
        first = await services[0].questions.get()
        for k in range(1, 15):
            now += 8.0
            services[0].answers.put_nowait(Score(request=first + k, reward=1.0))  # somebody else's
            while clients.counts["late_answers"] < k:
                await asyncio.sleep(0)
        while not clients.counts["verifications_repeated"]:
            await asyncio.sleep(0)
        assert not waiting.done() and now > 2 * clients.limit
        assert services[0].questions.get_nowait() == first and services[1].questions.empty()
        now += 51.0
        with pytest.raises(VerificationFailed, match="rewards-1: no answer to any question for 50 s"):
            await waiting
        clients.close()

    asyncio.run(asyncio.wait_for(body(), 20))
