"""The reward service as a process: answers every question once, by name where it fails, and leaves nothing behind."""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from areal_jax import config as configs
from areal_jax.rewards import __main__ as program
from areal_jax.transport.messages import Goodbye, Heartbeat, Hello, Score, Shutdown, Verify, VerifyFailed, Welcome
from areal_jax.transport.sockets import Client, Server

ROOT = Path(__file__).parents[2]
HERE = "tests.rewards.verifiers"
PATIENCE = 60.0


class World:
    """A controller that only listens, a client that asks, and a real reward service in a run's folder."""

    def __init__(self, workdir, **settings):
        config = configs.default_config()
        config.rewards.update(settings)
        configs.save(config, workdir)
        self.workdir, self.heard = workdir, []
        self._news = asyncio.Condition()

    async def __aenter__(self):
        self.controller = Server("tcp://127.0.0.1:*", "controller", self.workdir)
        self._listening = asyncio.create_task(self._listen())
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "areal_jax.rewards", "--workdir", str(self.workdir), "--index", "0", cwd=ROOT
        )
        self.asker = Client("rollout-0", self.workdir, server="rewards-0", timeout=PATIENCE)
        await self.hear(Hello)
        return self

    async def __aexit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        self._listening.cancel()
        self.asker.close()
        self.controller.close()

    async def _listen(self):
        async for peer, message in self.controller:
            self.peer = peer
            if isinstance(message, Hello):
                await self.controller.send(peer, Welcome(heartbeat_seconds=0.05))
            async with self._news:
                self.heard.append(message)
                self._news.notify_all()

    async def hear(self, kind, condition=lambda message: True):
        """The latest message of that kind that fulfils the condition, once there is one."""

        def found():
            return [message for message in self.heard if isinstance(message, kind) and condition(message)]

        async with self._news:
            await asyncio.wait_for(self._news.wait_for(found), PATIENCE)
        return found()[-1]

    async def ask(self, *questions):
        """Sends (request, completion) questions about the answer 2; replies by request."""
        for request, completion in questions:
            await self.asker.send(
                Verify(
                    request=request,
                    record={"answer": "2", "level": 1},
                    prompt="1+1?",
                    completion=completion,
                    prompt_tokens=[1, 2],
                    completion_tokens=list(range(len(completion))),
                )
            )
        replies = {}
        while len(replies) < len(dict(questions)):
            reply = await asyncio.wait_for(self.asker.receive(), PATIENCE)
            assert reply.request not in replies
            replies[reply.request] = reply
        return replies

    def processes(self):
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


def run(workdir, story, **settings):
    async def main():
        async with World(workdir, **settings) as world:
            return await story(world)

    return asyncio.run(main())


def test_scores_failures_and_counts(tmp_path):
    async def story(world):
        replies = await world.ask((1, "\\boxed{2}"), (2, "\\boxed{3}"), (3, "\\boxed{9^{9^{9^9}}}"))
        assert replies[1] == Score(request=1, reward=5.0, metrics={"accuracy": 1.0})
        assert replies[2] == Score(request=2, reward=-5.0, metrics={"accuracy": 0.0})
        assert isinstance(replies[3], VerifyFailed) and replies[3].error == "timeout" and replies[3].detail
        beat = await world.hear(Heartbeat, lambda beat: beat.counters.get("verified") == 2.0)
        beat = await world.hear(Heartbeat, lambda beat: beat.counters.get("failed_timeout") == 1.0)
        assert beat.counters["failed"] == 1.0 and beat.gauges["pending"] == 0.0 and beat.phase == "idle"
        assert beat.clock["verifying"] > 0.0
        hello = await world.hear(Hello)
        assert hello.role == "rewards" and hello.name == "rewards-0" and hello.pid == world.process.pid
        assert (tmp_path / "timeline" / "rewards-0.jsonl").exists()

    run(tmp_path, story, processes=2, scale=10.0, offset=-0.5, timeout=2.0)


def test_a_hundred_questions_through_a_narrow_door_and_one_asked_twice(tmp_path):
    async def story(world):
        questions = [(i, "\\boxed{2}" if i % 2 else "\\boxed{5}") for i in range(1, 101)]
        replies = await world.ask(*questions, questions[0], questions[1])
        assert {request: reply.reward for request, reply in replies.items()} == {i: float(i % 2) for i in range(1, 101)}

    run(tmp_path, story, max_pending=3)


@pytest.mark.parametrize("how", ["SIGTERM", "Shutdown"])
def test_it_ends_at_once_with_a_goodbye_and_no_orphans(tmp_path, how):
    async def story(world):
        await world.asker.send(Verify(1, {}, "", "", [], []))  # a verifier that never ends is at work
        await world.hear(Heartbeat, lambda beat: beat.gauges["pending"] == 1.0)
        while len(world.processes()) < 3:  # the service, a verifier process, and what that started
            await asyncio.sleep(0.01)
        processes = world.processes()
        if how == "SIGTERM":
            world.process.send_signal(signal.SIGTERM)
        else:
            await world.controller.send(world.peer, Shutdown(reason="the run is over"))
        assert await asyncio.wait_for(world.process.wait(), PATIENCE) == 0
        goodbye = await world.hear(Goodbye)
        assert goodbye.name == "rewards-0" and (how in goodbye.reason or "the run is over" in goodbye.reason)
        assert not [process for process in processes if process.is_running() and process.status() != "zombie"]

    run(tmp_path, story, verifiers=(f"{HERE}.loops",), timeout=600.0)


def test_verifier_processes_die_with_a_service_that_is_killed(tmp_path):
    async def story(world):
        await world.ask((1, "\\boxed{\\frac{4}{2}}"))
        processes = world.processes()
        assert len(processes) == 3
        os.kill(world.process.pid, signal.SIGKILL)
        await world.process.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes[1:], 10)
        assert not alive

    run(tmp_path, story, processes=2)


def test_several_verifiers_with_weights_and_arguments(tmp_path):
    settings = {
        "verifiers": ("areal_jax.rewards:verify_math", "areal_jax.rewards.shaping:format_penalty"),
        "weights": (1.0, 0.25),
        "verifier_args": ({"mode": "boxed"}, {"pattern": "so"}),
        "overlong_max": 20,
        "overlong_buffer": 10,
    }

    async def story(world):
        replies = await world.ask((1, "so \\boxed{2}"), (2, "2"), (3, "and thus \\boxed{2}"))
        assert replies[1].reward == pytest.approx(1.0 - 0.2) and replies[1].metrics["accuracy"] == 1.0
        assert replies[2].reward == -0.25 and replies[2].metrics["accuracy"] == 0.0
        assert replies[3].reward == pytest.approx(1.0 - 0.25 - 0.8) and replies[3].metrics["accuracy"] == 1.0
        assert replies[3].metrics["format_penalty/reward"] == -1.0

    run(tmp_path, story, **settings)


def test_a_service_that_finds_no_room_to_announce_itself_waits(tmp_path, monkeypatch):
    class FullDisk:
        tries = 0

        def __new__(cls, *_):
            cls.tries += 1
            if cls.tries == 1:
                raise OSError(errno.ENOSPC, "No space left on device", "endpoints/rewards-0")
            return "there is room"

    class Service:
        def __init__(self, recipe, *, server, **_):
            self.server, self.stop = server, None

        async def run(self):
            return self.server

    configs.save(configs.resolve({"model": "m", "data": {"train": "arithmetic"}}), tmp_path)
    monkeypatch.setattr(program, "Server", FullDisk)
    monkeypatch.setattr(program, "RewardService", Service)
    assert asyncio.run(program.serve(str(tmp_path), 0)) == "there is room" and FullDisk.tries == 2
