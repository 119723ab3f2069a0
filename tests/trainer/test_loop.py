"""The loop against a scripted controller over real sockets: order of events, bounds, files, stop and resume."""

import errno
import functools
import json
import os
import threading
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from areal_jax.config import section
from areal_jax.disk import NO_ROOM, insist
from areal_jax.metrics.clock import Clock
from areal_jax.trainer import loop as loop_lib
from areal_jax.trainer.batch import StalenessError
from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.guards import TrainingStopped
from areal_jax.trainer.link import BackgroundPublisher, Link, WaitedTooLong
from areal_jax.transport import messages as m
from areal_jax.transport.errors import RequestTimeout
from areal_jax.transport.silence import take_silence
from tests.trainer import fake, toy


def settings_of(config):
    return loop_lib.Settings(
        name=config["name"], model=config["model"], evaluates=True, config=config,
        trainer=section(TrainerConfig, config["trainer"]),
        controller=section(loop_lib.ControllerConfig, config["controller"]),
        rollout=section(loop_lib.RolloutConfig, config["rollout"]),
        metrics=section(loop_lib.MetricsConfig, config["metrics"]),
    )  # fmt: skip


def train(config, workdir, told_to_stop=lambda: False):
    import jax

    # One device, as a trainer on one CPU has; the tests' eight fake ones belong to the other tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_lib.learner.jax, "devices", lambda: jax.local_devices()[:1])
        return loop_lib.Training(settings_of(config), workdir, told_to_stop=told_to_stop).run()


class Listening(fake.FakeController):
    """Gives no evaluation's result before a heartbeat has told of its step: what the last one says is not luck."""

    def _answer(self, message):
        reply = super()._answer(message)
        told = {beat.counters.get("steps", 0) for beat in self.beats}
        late = isinstance(message, m.Evaluate) and message.version not in told
        return m.NotReady(waiting_for="a heartbeat of trainer-0") if late else reply


@pytest.mark.slow
def test_a_whole_run_then_stop_and_resume(tmp_path):
    """One story, to compile once: a run to the end; the same run stopped after two steps and resumed ends equal."""
    workdir, config = fake.prepare(tmp_path)
    with Listening(workdir) as controller:
        assert train(config, workdir)
    assert controller.kinds()[:4] == ["Publish", "Evaluate", "GetBatch", "Publish"]
    assert controller.kinds()[-4:] == ["Publish", "Evaluate", "GetState", "Finish"]
    assert sorted(controller.versions) == [0, 1, 2, 3]
    assert any((controller.versions[0][n] != controller.versions[3][n]).any() for n in controller.versions[0])
    exported = load_file(workdir / "export" / "model.safetensors")
    for name, value in controller.versions[3].items():
        np.testing.assert_array_equal(exported[name], value)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/accuracy"] for line in lines if "eval/accuracy" in line] == [0.0, pytest.approx(0.3)]
    rows = [line for line in lines if "actor/loss" in line]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["actor/ppo_kl"] == 0 and row["queue/depth"] == 4 and row["staleness/max"] <= 2
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["accuracy_before"] == 0.0 and summary["accuracy_after"] == pytest.approx(0.3)
    assert summary["recompiles_after_warmup"] == 0
    assert summary["trained_samples"] == 48 and summary["max_staleness"] == 2
    assert 0 <= summary["trainer_idle_fraction"] <= 1
    last = controller.beats[-1]
    assert last.counters["steps"] == 3 and sum(last.clock.values()) > 0

    again, config = fake.prepare(tmp_path / "second")
    asked = []
    with fake.FakeController(again) as first:
        first.on_batch = asked.append
        assert not train(config, again, told_to_stop=lambda: 2 in asked)
    assert not (again / "summary.json").exists()
    with fake.FakeController(again) as second:
        assert train(config, again)
    assert second.state.version == 2 and second.state.data == b"state of 2"
    assert sorted(second.versions) == [2, 3]
    for name, value in controller.versions[3].items():
        np.testing.assert_array_equal(second.versions[3][name], value)
    resumed = json.loads((again / "summary.json").read_text())
    assert resumed["accuracy_before"] == 0.0 and resumed["wall_seconds"] > 0


@pytest.mark.slow
def test_the_summary_of_a_resumed_run_counts_the_updates_skipped_before_it_was_stopped(tmp_path):
    workdir, config = fake.prepare(tmp_path, grad_norm_limit=1e-9)
    asked = []
    with fake.FakeController(workdir) as first:
        first.on_batch = asked.append
        assert not train(config, workdir, told_to_stop=lambda: 2 in asked)
    with fake.FakeController(workdir):
        assert train(config, workdir)
    assert json.loads((workdir / "summary.json").read_text())["skipped_updates"] == 3


@pytest.mark.slow
def test_what_must_not_be_trained_on_ends_the_run(tmp_path):
    def too_old(version):
        return toy.make_groups(np.random.default_rng(0), version=version, lags=(3,))

    workdir, config = fake.prepare(tmp_path, steps=9)
    with (
        fake.FakeController(workdir, lambda v: fake.FakeController(workdir).batches(v) if v < 3 else too_old(v)),
        pytest.raises(StalenessError, match=r"3 behind version 3.*max_staleness is 2"),
    ):
        train(config, workdir)

    def not_a_number(version):
        groups = toy.make_groups(np.random.default_rng(0), version=version)
        groups[0].samples[0][0].logprobs[-1] = -np.inf
        return groups

    workdir, config = fake.prepare(tmp_path / "nan", guard="stop", ratio_limit=1e3)
    with fake.FakeController(workdir, not_a_number), pytest.raises(TrainingStopped, match=r"version-1\.npz"):
        train(config, workdir)
    assert np.load(workdir / "postmortem" / "version-1.npz")["0/tokens"].shape[1:] == (4, 64)


def test_waiting_for_a_batch_is_bounded_and_names_who_is_awaited(tmp_path):
    (tmp_path / "run").mkdir()
    controller = fake.FakeController(tmp_path / "run")
    controller._answer = lambda message: (
        m.NotReady(waiting_for="rollout-1") if isinstance(message, m.GetBatch) else None
    )
    clock = Clock()
    with controller, Link(tmp_path / "run", 0, clock, heartbeat_seconds=0.05) as link:
        with pytest.raises(WaitedTooLong, match=r"waited 0 s for batch; the controller is waiting for rollout-1"):
            link.batch(0, 0.05)
        assert clock.totals()["waiting:batch"] > 0


def test_the_time_in_which_the_controllers_disk_is_full_does_not_count_against_a_batch(tmp_path):
    full = m.NotReady(waiting_for="room on the disk", disk=True)
    replies = [full, full, full, m.NotReady(waiting_for="rollout-1"), m.Batch(version=0, groups=[])]
    with fake.FakeController(tmp_path), Link(tmp_path, 0, Clock()) as link, pytest.MonkeyPatch.context() as patch:
        link.request = lambda message: replies.pop(0)
        patch.setattr("areal_jax.trainer.link.time", types.SimpleNamespace(monotonic=lambda: 400.0 * -len(replies)))
        assert link.batch(0, 500.0).version == 0
        replies = [m.NotReady(waiting_for="rollout-1")] * 5
        with pytest.raises(WaitedTooLong, match="rollout-1"):
            link.batch(0, 500.0)


def test_a_trainer_without_room_says_so_whatever_it_does(tmp_path):
    with fake.FakeController(tmp_path), Link(tmp_path, 0, Clock("checkpointing")) as link:
        link.no_room["publisher"] = "weights/part cannot be written"
        assert link._beat().phase == NO_ROOM
        link.no_room["publisher"] = ""
        assert link._beat().phase == "checkpointing"


def test_a_version_that_finds_no_room_is_written_again_as_a_whole(tmp_path, monkeypatch):
    write, made = os.pwrite, []

    def limited(fd, data, offset):
        if len(made) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data, offset)

    def tensors(measured):
        measured["gather"] = 1.0
        made.append(measured)
        return iter([("w", np.arange(4, dtype=np.float32))])

    monkeypatch.setattr("areal_jax.weights.file.os.pwrite", limited)
    controller = fake.FakeController(tmp_path)
    with controller:
        problems = []
        wait = functools.partial(insist, limit=60.0, sleep=lambda seconds: None, tell=problems.append)
        publisher = BackgroundPublisher(tmp_path, transport="disk", limit=10.0, insist=wait)
        publisher.start(0, tensors)
        publisher.join()
        publisher.close()
    assert len(made) == 3 and controller.versions[0]["w"].tolist() == [0, 1, 2, 3]
    assert problems == [f"{tmp_path / 'weights' / 'part'} cannot be written: No space left on device"] * 2 + [""]


def test_a_controller_that_does_not_answer_is_reported_and_the_next_one_is_asked(tmp_path):
    report = tmp_path / "silent" / "controller"
    controller = fake.FakeController(tmp_path)
    controller._answer = lambda message: (  # it hangs until it is reported; then another takes its place
        m.State(version=message.version, data=b"") if isinstance(message, m.GetState) and report.exists() else None
    )
    with controller, Link(tmp_path, 0, Clock(), limit=0.5) as link:
        assert link.request(m.GetState(version=4)).version == 4
    silence = take_silence(tmp_path, "controller")
    assert (silence.pid, silence.seconds, silence.by) == (0, 0.5, "trainer-0")
    assert silence.phase == "asked for GetState"


def test_a_publisher_reports_a_controller_that_does_not_answer_too(tmp_path):
    controller = fake.FakeController(tmp_path)
    controller._answer = lambda message: None
    with controller:
        publisher = BackgroundPublisher(tmp_path, transport="disk", limit=0.2)
        with pytest.raises(RequestTimeout):
            publisher.publish(0, lambda measured: [("w", np.zeros(2, np.float32))])
        publisher.close()
    assert take_silence(tmp_path, "controller").by == "trainer-publisher"


def test_a_version_that_is_not_published_in_time_ends_the_wait_with_what_was_being_done(tmp_path):
    go_on = threading.Event()

    def tensors(measured):
        go_on.wait(60)  # a device that does not answer
        return iter([("w", np.zeros(2, np.float32))])

    with fake.FakeController(tmp_path):
        publisher = BackgroundPublisher(tmp_path, transport="disk", limit=0.1, patience=0.1)
        publisher.start(7, tensors)
        with pytest.raises(WaitedTooLong, match="publishing thread: version 7 is being written"):
            publisher.join()
        go_on.set()
        publisher._thread.join(60)
        publisher.close()
