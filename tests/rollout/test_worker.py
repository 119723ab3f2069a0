"""The rollout worker over real sockets: every task ends in a sample or in a failure with a name."""

import asyncio
import os

import numpy as np
import pytest
from worlds import ScriptedEngine, World, manifest, play

from areal_jax.rollout.session import Transcript
from areal_jax.transport.messages import (
    Cancel,
    Goodbye,
    Hello,
    Refused,
    SampleDone,
    SampleFailed,
    Shutdown,
    Trajectory,
    UpdateWeights,
    VerifyFailed,
    WeightsLoaded,
    Welcome,
)
from areal_jax.transport.options import HELLO_FIRST
from areal_jax.transport.server import Server


def test_a_sample_from_hello_to_trajectory(tmp_path):
    async def story(world):
        hello = await world.welcome()
        assert (hello.role, hello.name, hello.pid) == ("rollout", "rollout-0", os.getpid())
        assert (hello.slots, hello.version) == (4, -1)
        await world.assign("a+b?", group=6)
        asked = await world.score(0.75, accuracy=1.0, boxed=0.0)
        assert (asked.prompt, asked.completion, asked.record["answer"]) == ("a+b?", "A+B?", "42")
        assert asked.completion_tokens == [*map(ord, "A+B?"), 0]
        done = await world.receive(SampleDone)
        assert (done.name, done.group, done.sample, done.attempt) == ("rollout-0", 6, 0, 2)
        [t] = done.trajectories
        assert t.tokens.tolist() == [*map(ord, "a+b?A+B?"), 0]
        assert t.loss_mask.tolist() == [False] * 4 + [True] * 5
        np.testing.assert_allclose(t.logprobs, [0, 0, 0, 0, -0.125, -0.25, -0.375, -0.5, -0.625])
        assert t.versions.tolist() == [-1] * 4 + [0] * 5
        assert (t.reward, t.finish_reason, t.metrics) == (0.75, "stop", {"accuracy": 1.0, "boxed": 0.0})
        [request] = world.engine.requests
        assert request.key == (11, 6, 0) and request.sampling.temperature == 0.8
        await world.assign("x", group=-1, evaluation=True)
        await world.score(1.0)
        [t] = (await world.receive(SampleDone)).trajectories
        assert t.metrics == {"accuracy": 1.0}
        assert world.engine.requests[1].key == (11, -1, 0) and world.engine.requests[1].sampling.temperature == 0.0
        await world.say(Shutdown(reason="that was all"))
        goodbye = await world.receive(Goodbye)
        assert goodbye.reason == "that was all" and not goodbye.died
        assert await world.running == 0 and world.engine.closed

    play(World(tmp_path), story)


def test_slow_samples_do_not_hold_others_up(tmp_path):
    async def story(world):
        world.engine.gates["slow"] = gate = asyncio.Event()
        await world.welcome()
        await world.assign("slow", "quick", "brisk")
        for _ in range(2):
            await world.score(1.0)
            assert (await world.receive(SampleDone)).sample in (1, 2)
        gate.set()
        await world.score(0.0)
        assert (await world.receive(SampleDone)).sample == 0

    play(World(tmp_path), story)


def test_failures_have_names_and_are_never_scores(tmp_path):
    script = {
        "good": "yes\0", "verifier": "?\0", "nan": FloatingPointError("log-probs are not finite"),
        "long": ValueError("a prompt of 300 tokens leaves no room"),
    }.__getitem__  # fmt: skip

    async def story(world):
        await world.welcome()
        names = {}
        for prompt in ("verifier", "nan", "long"):
            await world.assign(prompt)
            if prompt == "verifier":
                message, answer = await world.question()
                await answer(VerifyFailed(request=message.request, error="timeout", detail="15 s"))
            failed = await world.receive(SampleFailed)
            names[prompt] = (failed.error, failed.detail, failed.attempt)
        assert names["verifier"] == ("verifier_timeout", "15 s", 2)
        assert names["nan"] == ("not_finite", "log-probs are not finite", 2)
        assert names["long"] == ("workflow_error", "ValueError: a prompt of 300 tokens leaves no room", 2)
        await world.assign("good")
        await world.score(1.0)
        assert (await world.receive(SampleDone)).trajectories[0].reward == 1.0

    play(World(tmp_path, ScriptedEngine(script)), story)


@pytest.mark.parametrize("result", [None, [], ["text"]])
def test_a_workflow_that_returns_nonsense_is_an_error(tmp_path, result):
    class Nonsense:
        async def run(self, session, record):
            return result

    async def story(world):
        await world.welcome()
        await world.assign("x")
        failed = await world.receive(SampleFailed)
        assert failed.error == "workflow_error" and "Trajectory" in failed.detail

    play(World(tmp_path, workflow=Nonsense()), story)


ONES = {"tokens": np.ones(2, np.int32), "loss_mask": np.ones(2, bool), "versions": np.zeros(2, np.int32)}


def test_a_trajectory_that_no_row_need_hold_is_an_error_of_its_workflow(tmp_path):
    class Talkative:
        async def run(self, session, record):
            transcript = Transcript(session.encode(record))
            transcript.sampled(await session.generate(transcript.tokens))
            transcript.give(np.ones(session.room(transcript.tokens) + (record["prompt"] == "long"), np.int32))
            return [transcript.trajectory(1.0, {}, "stop")]

    async def story(world):
        await world.welcome()
        await world.assign("long")
        failed = await world.receive(SampleFailed)
        assert failed.detail == "ValueError: a trajectory has 201 tokens, more than rollout.max_length=200"
        await world.assign("short")
        assert len((await world.receive(SampleDone)).trajectories[0].tokens) == 200

    play(World(tmp_path, workflow=Talkative()), story)


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        ({"metrics": {"note": "text"}}, "'note' is 'text', not a number"),
        ({"reward": None}, "'reward' is None, not a number"),
        ({"reward": 1 << 70}, "cannot be sent"),
        ({"logprobs": np.zeros(2, np.float64)}, "arrays of float64 are not sent"),
        ({"metrics": {"right": True, "loss": np.float32(0.5), "hash": 1 << 70}}, ""),
    ],
)
def test_numbers_of_a_workflow_are_sent_or_named_and_every_sample_is_answered(tmp_path, strange, said):
    class Strange:
        async def run(self, session, record):
            usual = {"logprobs": np.zeros(2, np.float32), "reward": 1.0, "finish_reason": "stop", "metrics": {}}
            return [Trajectory(**ONES, **(usual | strange))]

    async def story(world):
        await world.welcome()
        await world.assign("x")
        if said:
            failed = await world.receive(SampleFailed)
            assert failed.error == "workflow_error" and said in failed.detail
        else:
            done = await world.receive(SampleDone)
            assert done.trajectories[0].metrics == {"right": 1.0, "loss": 0.5, "hash": float(1 << 70)}
        counted = (await world.heartbeat("waiting:controller")).counters
        assert (counted.get("samples_failed", 0), counted.get("samples_done", 0)) == ((1, 0) if said else (0, 1))

    play(World(tmp_path, workflow=Strange()), story)


def test_the_death_of_the_engine_is_reported_and_ends_the_worker(tmp_path):
    async def story(world):
        world.engine.gates["x"] = gate = asyncio.Event()
        await world.welcome()
        await world.assign("x")
        await world.heartbeat("generating")
        world.engine.die()
        gate.set()
        said = await world.receive((SampleFailed, Goodbye))  # no sample failed: others will run them
        assert isinstance(said, Goodbye) and said.died and "a test killed it" in said.reason
        assert await world.running == 3

    play(World(tmp_path), story)


def test_cancelled_samples_stop_and_are_not_reported(tmp_path):
    async def story(world):
        world.engine.gates |= {"x": asyncio.Event(), "y": asyncio.Event()}
        await world.welcome()
        await world.assign("x", "y")
        await world.heartbeat("generating")
        await world.say(Cancel(tasks=[(0, 0)]))
        world.engine.gates["y"].set()
        await world.score(1.0)
        assert (await world.receive(SampleDone)).sample == 1
        assert world.engine.cancelled == ["x"]

    play(World(tmp_path), story)


# --- Weights -------------------------------------------------------------------------------------------------------


def test_tasks_wait_for_the_first_weights_and_the_newest_version_is_loaded(tmp_path):
    async def story(world):
        await world.welcome(version=None)
        await world.assign("x")
        world.engine.load_gate = asyncio.Event()
        await world.say(UpdateWeights(manifest=manifest(3)))
        while not world.engine.asked:
            await world.heartbeat("starting")
        for version in (4, 5):
            await world.say(UpdateWeights(manifest=manifest(version)))
        await world.heartbeat("starting")
        await world.heartbeat("starting")
        assert not world.engine.requests
        world.engine.load_gate.set()
        assert (await world.receive(WeightsLoaded)).version == 3
        await world.score(1.0)
        seen = [await world.receive((WeightsLoaded, SampleDone)) for _ in range(2)]
        [loaded] = [m for m in seen if isinstance(m, WeightsLoaded)]
        assert loaded.version == 5 and world.engine.loads == [3, 5]
        assert loaded.timings.keys() == {"pause", "latency"} and loaded.timings["pause"] == 0.5

    play(World(tmp_path), story)


def test_refused_weights_are_reported_and_the_worker_stays_on_the_old_ones(tmp_path):
    async def story(world):
        world.engine.refused = {1}
        await world.welcome()
        await world.say(UpdateWeights(manifest=manifest(1)))
        loaded = await world.receive(WeightsLoaded)
        assert loaded.version == 1 and "checksum" in loaded.error
        await world.assign("x")
        await world.score(1.0)
        assert set((await world.receive(SampleDone)).trajectories[0].versions.tolist()) == {-1, 0}

    play(World(tmp_path), story)


def test_going_back_to_an_older_version_gives_up_what_newer_weights_sampled(tmp_path):
    async def story(world):
        world.engine.gates["x"] = asyncio.Event()
        await world.welcome(version=5)
        await world.assign("x")
        await world.heartbeat("generating")
        await world.say(UpdateWeights(manifest=manifest(3)))
        assert (await world.receive(SampleFailed)).error == "weights_rolled_back"
        assert (await world.receive(WeightsLoaded)).version == 3
        assert world.engine.cancelled == ["x"]

    play(World(tmp_path), story)


# --- What restarts -------------------------------------------------------------------------------------------------


def test_a_restarted_controller_is_greeted_again_and_told_what_runs(tmp_path):
    async def story(world):
        world.engine.gates |= {"x": asyncio.Event(), "y": asyncio.Event()}
        first = await world.welcome()
        await world.assign("x", "y")
        await world.heartbeat("generating")
        world.controller.close()
        world.controller = Server("tcp://127.0.0.1:*", "controller", tmp_path)
        while True:  # a new controller knows nobody: whatever comes first is answered with the question who that is
            world.peer, message = await world.controller.receive()
            if isinstance(message, Hello):
                break
            await world.say(Refused(reason=HELLO_FIRST))
        assert message.version == 0 and message.running == [(0, 0, 2), (0, 1, 2)]
        assert message.life == first.life, "the same process, though others may have its number"
        await world.say(Welcome(heartbeat_seconds=0.02))
        await world.say(Cancel(tasks=[(0, 0)]))
        while not world.engine.cancelled:  # before the other may end: its score comes by another socket
            await world.controller.receive()
        world.engine.gates["y"].set()
        await world.score(1.0)
        while not isinstance(message, SampleDone):
            message = await world.receive((SampleDone, Hello))
        assert (message.group, message.sample) == (0, 1) and world.engine.cancelled == ["x"]

    play(World(tmp_path), story)


def test_no_worker_has_the_number_of_the_one_before_it(tmp_path):
    lives = set()

    async def story(world):
        lives.add((await world.welcome()).life)

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        play(World(tmp_path / name), story)
    assert len(lives) == 2


def test_a_silent_reward_service_is_replaced_by_another(tmp_path):
    async def story(world):
        await world.welcome()
        await world.assign("x")
        await world.question(0)  # never answered
        await world.score(1.0, service=1)
        assert (await world.receive(SampleDone)).trajectories[0].reward == 1.0

    play(World(tmp_path, services=2, patience=0.05), story)


@pytest.mark.parametrize("patience", [0.2, 1000.0])  # by its silence, or by the lost connection
def test_a_restarted_reward_service_is_asked_again(tmp_path, patience):
    async def story(world):
        await world.welcome()
        await world.assign("x")
        await world.question()
        world.rewards[0].close()
        while not (world.worker.verifier.lost or world.worker.verifier.counts["verifications_repeated"]):
            await world.heartbeat("waiting:rewards")
        world.rewards[0] = Server("tcp://127.0.0.1:*", "rewards-0", tmp_path)
        await world.score(1.0)
        assert (await world.receive(SampleDone)).trajectories[0].reward == 1.0

    play(World(tmp_path, patience=patience), story)


def test_reward_services_that_never_answer_are_a_named_failure(tmp_path):
    async def story(world):
        await world.welcome()
        await world.assign("x")
        await world.question()
        failed = await world.receive(SampleFailed)
        assert failed.error == "verifier_silent" and "rewards-0" in failed.detail

    play(World(tmp_path, patience=0.05, limit=0.2), story)


# --- The clock -----------------------------------------------------------------------------------------------------


def test_heartbeats_say_truthfully_what_the_worker_does(tmp_path):
    async def story(world):
        engine = world.engine
        engine.gates["x"] = asyncio.Event()
        await world.welcome(version=None)
        await world.heartbeat("starting")
        await world.say(UpdateWeights(manifest=manifest(0)))
        assert (await world.receive(WeightsLoaded)).version == 0
        await world.heartbeat("waiting:controller")
        await world.assign("x")
        await world.heartbeat("generating")
        engine.paused = True
        engine.on_change()
        await world.heartbeat("loading_weights")
        engine.paused = False
        engine.on_change()
        await world.heartbeat("generating")
        engine.gates["x"].set()
        await world.heartbeat("waiting:rewards")
        await world.score(1.0)
        await world.receive(SampleDone)
        last = await world.heartbeat("waiting:controller")
        phases = {"starting", "waiting:controller", "generating", "loading_weights", "workflow", "waiting:rewards"}
        assert set(last.clock) == phases
        assert sum(last.clock.values()) <= world.worker.clock.age()
        assert last.counters["tokens_generated"] == 7 and last.counters["samples_done"] == 1
        assert last.counters["verifications"] == 1
        assert last.gauges == {"running": 0, "waiting": 0, "version": 0, "samples": 0}

    play(World(tmp_path), story)
