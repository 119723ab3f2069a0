"""The controller's decisions, event by event."""

import numpy as np
import pytest

from areal_jax.controller.config import ControllerConfig
from areal_jax.transport import messages as m

from .simulation import FakeWorker, World, manifest, trajectory


def config(**changes):
    return ControllerConfig(**({"batch_size": 2, "group_size": 2, "max_staleness": 1, "shuffle": False} | changes))


def start(world, name="a", slots=8):
    worker = world.join(name, slots)
    if world.version < 0:
        world.publish(0)
    while worker.updates:
        world.load(worker)
    return worker


def running(world):
    return sorted({slot[0] for worker in world.workers.values() for slot in worker.work})


def finish(world, worker, *groups, reward=None):
    for group in groups:
        for slot in sorted(slot for slot in worker.work if slot[0] == group):
            world.done(worker, slot, reward)


def numbers(batch):
    return [group.group for group in batch.groups]


# --- Weights and assignment ----------------------------------------------------------------------------------------


def test_the_first_weights_come_before_the_first_task():
    world = World(config(), 10)
    worker = world.join("a", slots=4)
    assert not worker.work and not worker.updates
    world.publish(0)
    assert [u.version for u in worker.updates] == [0] and not worker.work
    world.load(worker)
    assert running(world) == [0, 1, 2], "room for five samples: two groups of two, and part of a third"


def test_a_worker_that_joins_late_gets_the_newest_weights_first():
    world = World(config(), 10)
    start(world)
    world.train(3)
    late = world.join("b")
    assert [u.version for u in late.updates] == [3] and not late.work


def test_a_group_stays_on_one_worker_where_there_is_room():
    world = World(config(group_size=4, max_staleness=9), 10)
    world.publish(0)
    for name in "ab":
        world.join(name, slots=8)
    for worker in world.workers.values():
        world.load(worker)
    owners = {}
    for worker in world.workers.values():
        for group, _ in worker.work:
            owners.setdefault(group, set()).add(worker.name)
    assert sum(len(names) == 1 for names in owners.values()) >= len(owners) - 1


def test_workers_load_one_after_another_or_all_at_once():
    for rolling, expected in ((True, 1), (False, 3)):
        world = World(config(), 20, rolling=rolling)
        for name in "abc":
            start(world, name)
        finish(world, world.workers["a"], 0, 1, 2, 3)
        for worker in world.workers.values():
            finish(world, worker, 0, 1, 2, 3)
        world.get_batch(0)
        world.publish(1)
        told = [worker for worker in world.workers.values() if worker.updates]
        assert len(told) == expected
        world.load(told[0])
        assert len([worker for worker in world.workers.values() if worker.updates]) == expected - (not rolling)


def test_a_refused_version_is_sent_again_after_a_pause():
    world = World(config(), 10)
    worker = world.join("a")
    world.publish(0)
    world.load(worker, error="checksum of lm_head")
    assert not worker.updates and world.core.failed["weights_refused"] == 1
    world.advance(5.0)
    assert [u.version for u in worker.updates] == [0]


def test_a_refused_version_that_was_overtaken_is_followed_by_the_newest_at_once():
    world = World(config(max_staleness=3), 20)
    worker = start(world)
    finish(world, worker, 0, 1, 2, 3)
    world.get_batch(0)
    world.publish(1)
    world.get_batch(1)
    world.publish(2)
    world.load(worker, error="version 1 is gone")
    assert [u.version for u in worker.updates] == [2]
    world.load(worker, error="version 2 is gone")
    assert not worker.updates  # but not for ever


# --- Batches and staleness -----------------------------------------------------------------------------------------


def test_a_batch_is_the_oldest_groups_and_the_same_when_asked_again():
    world = World(config(), 10)
    a = start(world)
    assert running(world) == [0, 1, 2, 3], "(η + version + 1)·B = 4 groups"
    finish(world, a, 3, 1, 2)
    batch = world.get_batch(0)
    assert numbers(batch) == [1, 2]
    assert world.get_batch(0) is batch
    assert isinstance(world.get_batch(2), m.Refused)
    assert running(world) == [0], "the gate opens with the version, not with the batch"
    assert world.publish(1) == m.Published(version=1)
    assert running(world) == [0], "a worker with version 0 may not run group number 5: it would be too old in batch 2"
    world.load(a)
    assert running(world) == [0, 4, 5]
    assert world.publish(1) == m.Published(version=1), "repeated requests are answered alike"
    assert isinstance(world.get_batch(0), m.Refused), "consumed for good"
    assert isinstance(world.publish(3), m.Refused) and isinstance(world.publish(2), m.Refused)
    world.audit()


def stale(over_age):
    """Group 0 is slow: everything else of versions 0 and 1 is finished and trained on, and batch 2 is wanted."""
    world = World(config(over_age=over_age), 20)
    a = start(world, slots=20)
    slow = (0, 0)
    a.grow(slow)
    for version in range(2):
        for slot in sorted(a.work):
            if slot != slow:
                world.done(a, slot)
        world.get_batch(version)
        if version == 0:
            world.publish(1)
            world.load(a)
    return world, a, slow


def test_drop_queues_the_prompt_again_under_a_new_number():
    world, a, slow = stale("drop")
    assert slow not in a.work, "batch 1 was its last chance: it is stopped when that batch is taken"
    assert world.core.counters["dropped_stale"] == 1 and world.core.counters["dropped_stale_samples"] == 1
    world.publish(2)
    world.load(a)
    again = [work.task for work in a.work.values() if work.task.record == {"prompt": "0"}]
    assert again and all(task.group > 3 for task in again)
    world.train(5)
    world.audit()


def test_wait_makes_the_trainer_wait_for_the_group_that_is_due():
    world, a, slow = stale("wait")
    assert slow in a.work
    reply = world.get_batch(1)
    assert isinstance(reply, m.NotReady)
    assert reply.waiting_for.startswith("group 0, begun at version 0 and due by step 1: 1 samples run on a")
    world.done(a, slow)
    assert 0 in numbers(world.get_batch(1))
    assert world.core.counters["dropped_stale"] == 0


def test_a_queued_group_waits_for_newer_weights_where_old_ones_would_make_it_late():
    """With `wait`: two groups that lost their worker may not both go to one with version 0, or one misses batch 2."""
    world = World(config(over_age="wait", group_size=1, batch_size=1, max_staleness=2), 20)
    z = start(world, "z", slots=3)
    finish(world, z, 0)
    assert numbers(world.get_batch(0)) == [0]
    a = start(world, "a", slots=4)
    world.publish(1)
    b = start(world, "b", slots=8)
    world.leave("z")
    assert sorted(b.work) == [(1, 0), (2, 0), (3, 0)] and a.version == 0
    finish(world, b, 3)
    assert numbers(world.get_batch(1)) == [3], "it overtakes 1 and 2, which were begun with version 1"
    world.leave("b")
    assert sorted(a.work) == [(1, 0)]
    world.load(a)
    assert sorted(a.work) == [(1, 0), (2, 0)]
    world.publish(2)
    world.train(4)
    assert world.core.counters["dropped_stale"] == 0
    world.audit()


def test_eta_zero_is_a_fixed_sequence_whoever_runs_it():
    batches = []
    for names in ("a", "abc"):
        world = World(config(max_staleness=0, shuffle=True), 12, seed=len(names))
        for name in names:
            start(world, name, slots=3)
        batches.append([])
        for step in range(8):
            world.settle()
            world.advance(0.1)
            world.settle()
            batch = world.get_batch(step)
            batches[-1].append([(group.group, group.epoch, group.record_index) for group in batch.groups])
            world.publish(step + 1)
    assert batches[0] == batches[1]
    assert [number for batch in batches[0] for number, _, _ in batch] == list(range(16))


def test_the_batch_says_how_stale_it_is():
    world = World(config(), 10)
    a = start(world)
    finish(world, a, 0, 1, 2, 3)
    first = world.get_batch(0).report
    assert (first["staleness/max"], first["staleness/hist_0"]) == (0, 2)
    assert (first["queue/depth"], first["queue/left"]) == (4, 2)
    world.publish(1)
    second = world.get_batch(1).report
    assert (second["staleness/mean"], second["staleness/hist_0"], second["staleness/hist_1"]) == (1, 0, 2)
    assert second["staleness/spans"] == 1 and second["staleness/token_mean"] == 1
    world.publish(2)
    final = world.core.finish(world.now)
    assert final["staleness_histogram"] == {"0": 2, "1": 2} and final["max_staleness"] == 1
    assert final["trained_samples"] == 8 and final["staleness_bound"] == 1


def test_the_batch_says_what_the_slowest_worker_took_for_its_last_update():
    world = World(config(max_staleness=3), 20)
    a, b = start(world, "a"), start(world, "b")
    for worker in (a, b):
        for slot in list(worker.work):
            world.done(worker, slot)
    world.get_batch(0)
    world.publish(1)
    world.load(a, load=0.2, pause=0.3)
    world.load(b, load=0.1, pause=0.4)
    report = world.get_batch(1).report
    assert {name: report[name] for name in report if name.startswith("update/")} == {
        "update/load": 0.2,
        "update/pause": 0.4,
    }


# --- Filtering, failures, quarantine -------------------------------------------------------------------------------


def test_uninformative_groups_leave_the_count_and_are_replaced():
    world = World(config(dynamic_filter=True, max_staleness=0), 30)
    a = start(world)
    assert running(world) == [0, 1]
    finish(world, a, 0, reward=1.0)
    assert running(world) == [1, 2] and world.core.counters["filtered"] == 1
    for group in (1, 2):
        world.done(a, (group, 0), 1.0)
        world.done(a, (group, 1), 0.0)
    assert numbers(world.get_batch(0)) == [1, 2]
    assert world.core.ledger.totals == {"filtered": 1}


def test_an_epoch_without_any_signal_ends_with_a_diagnosis():
    world = World(config(dynamic_filter=True), 20)
    a = start(world)
    for _ in range(40):
        if world.stopped:
            break
        finish(world, a, min(running(world)), reward=0.0)
    assert "the last 20 groups were all filtered" in world.stopped
    assert world.get_batch(0) == m.Refused(reason=world.stopped)


def test_a_failed_sample_is_tried_again_and_then_its_prompt_is_put_away():
    world = World(config(max_attempts=2), 20)
    a = start(world)
    world.fail(a, (0, 0), "verifier_timeout")
    assert (0, 0) not in a.work, "after a pause"
    world.advance(1.0)
    assert (0, 0) in a.work
    world.fail(a, (0, 0), "verifier_timeout")
    assert 0 not in running(world) and world.core.failed["verifier_timeout"] == 2
    assert world.core.counters["quarantined"] == 1
    assert "record 0 (epoch 0): 2 tries of sample 0 failed, at last by verifier_timeout" in world.core.quarantined[0]
    assert 4 in running(world), "its place in the count is free again"
    assert world.train(3)
    world.audit()


def test_when_everything_fails_the_run_ends_with_the_reason():
    world = World(config(max_attempts=1), 20)
    a = start(world)
    for _ in range(8):
        world.fail(a, min(a.work), "verifier_unavailable")
    assert "8 prompts in a row failed" in world.stopped and "verifier_unavailable" in world.stopped


def bad(**changes):
    good = trajectory([0, 0])
    fields = {name: getattr(good, name) for name in m.Trajectory.__struct_fields__} | changes
    return m.Trajectory(**fields)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (bad(versions=np.array([-1, -1, 0, 7], np.int32)), "versions 0 to 7"),
        (bad(versions=np.array([-1, -1, -1, 0], np.int32)), "versions -1 to 0"),
        (bad(versions=np.array([-1, 0, 0, 0], np.int32)), "was not sampled has a version"),
        (bad(logprobs=np.array([0, 0, np.nan, -1], np.float32)), "not finite"),
        (bad(logprobs=np.zeros(3, np.float32)), "logprobs is float32[3]"),
        (bad(tokens=np.arange(4, dtype=np.int64)), "tokens is int64[4]"),
        (bad(loss_mask=np.zeros(4, bool)), "no token was sampled"),
        (bad(reward=float("inf")), "reward or metric is not finite"),
        (bad(metrics={"accuracy": float("nan")}), "reward or metric is not finite"),
    ],
)
def test_a_malformed_trajectory_is_a_named_failure_never_data(wrong, why):
    world = World(config(), 20)
    a = start(world)
    task = a.work.pop((0, 0)).task
    world.report(m.SampleDone("a", 0, 0, task.attempt, [wrong]))
    assert world.core.failed == {"malformed_trajectory": 1}
    assert why in world.core.telemetry.notes[-1][1]
    world.advance(1.0)
    assert (0, 0) in a.work


def test_decreasing_versions_are_refused():
    world = World(config(), 20)
    a = start(world)
    world.train(1)
    world.settle()
    world.publish(world.version)
    slot = min(a.work, default=None)
    if slot is None:
        world.get_batch(world.version)
        world.publish(world.version + 1)
        world.load(a)
        slot = min(a.work)
    task = a.work.pop(slot).task
    world.report(m.SampleDone("a", *slot, task.attempt, [trajectory([1, 0])]))
    assert "versions decrease" in world.core.telemetry.notes[-1][1]


# --- Workers that come and go --------------------------------------------------------------------------------------


def test_a_silent_worker_is_found_dead_and_its_samples_move():
    world = World(config(), 20)
    a, b = start(world, "a", 4), start(world, "b", 8)
    had = set(a.work)
    late = world.results
    task = a.work[min(had)].task
    world.die("a")
    assert had <= set(b.work) and world.core.counters["workers_died"] == 1
    back = world.join("a", slots=1)
    world.report(m.SampleDone("a", task.group, task.sample, task.attempt, [trajectory([0])]))
    assert world.core.counters["late_results"] == 1 and late and not back.work
    slot = min(b.work)
    world.done(b, slot)
    world.report(world.results[-1])
    assert world.core.counters["duplicate_results"] + world.core.counters["late_results"] == 2
    world.train(3)
    world.audit()


def test_a_worker_that_comes_back_keeps_what_nobody_else_got():
    world = World(config(), 20)
    a = start(world, "a", 8)
    a.grow((0, 0))
    world.core.tick(world.now + 100.0)
    world.now += 100.0
    assert world.core.fleet.workers == {}
    world.deliver()
    kept = dict(a.work)
    world.core.hello(a.hello(), world.now)
    world.deliver()
    assert kept.items() <= a.work.items(), "it goes on where it was"
    world.done(a, (0, 0))
    assert world.core.counters["late_results"] == 0
    world.audit()


def test_a_worker_whose_engine_died_hands_its_samples_over_at_once_and_none_of_them_has_failed():
    world = World(config(max_attempts=1), 20)
    a, b = start(world, "a", 4), start(world, "b", 8)
    had, now = set(a.work), world.now
    world.leave("a", died=True)
    assert had <= set(b.work) and world.now == now and world.core.counters["workers_died"] == 1
    assert not world.core.failed and not world.core.counters["quarantined"]
    world.train(3)
    world.audit()


@pytest.mark.parametrize("die", [World.die, lambda w, name: w.leave(name, died=True)], ids=["silent", "goodbye"])
def test_a_prompt_that_kills_its_workers_is_put_away_and_the_others_are_not(die):
    world = World(config(max_attempts=2, group_size=1, batch_size=2, max_staleness=3), 40)
    crashes = 0
    for life in range(12):
        worker = start(world, f"w{life}", slots=3)
        while worker.work:
            poisoned = [slot for slot, work in worker.work.items() if work.task.record["prompt"] == "1"]
            if poisoned:
                crashes += 1
                die(world, worker.name)
                break
            world.done(worker, min(worker.work))
        if worker.name in world.workers:
            break
    assert crashes == 4, "two to come under suspicion, and max_attempts of its own"
    assert world.core.counters["quarantined"] == 1
    assert "record 1 (epoch 0): 4 rollout workers died while they ran it" in world.core.quarantined[0]
    assert world.train(3)
    world.audit()


def test_silence_of_everybody_ends_with_a_diagnosis_that_names_them():
    world = World(config(progress_limit=60.0), 20)
    start(world, "a")
    for _ in range(9):
        world.advance(10.0)
    assert world.stopped.startswith("no sample finished and no batch was taken for 70 s")
    assert "a: 8 samples running at version 0, last heard 0.0 s ago: generating" in world.stopped
    world = World(config(), 20)
    world.publish(0)
    assert "a rollout worker: none is there" in world.get_batch(0).waiting_for


# --- Epochs --------------------------------------------------------------------------------------------------------


def test_every_prompt_of_every_epoch_once_and_a_short_last_batch():
    world = World(config(epochs=2, batch_size=3, shuffle=True), 5)
    start(world)
    while world.train(1):
        pass
    visits = sorted((group.epoch, group.record_index) for _, group in world.consumed)
    assert visits == [(epoch, index) for epoch in range(2) for index in range(5)]
    sizes = [len([g for step, g in world.consumed if step == s]) for s in range(4)]
    assert sizes == [3, 3, 3, 1]
    assert [done["consumed"] for done in world.core.ledger.epochs_done] == [5, 5]


# --- Evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_runs_on_exactly_its_version_beside_training():
    world = World(config(max_staleness=3), 50, evals=5)
    a = start(world, "a", 4)
    assert isinstance(world.core.evaluate(1, 0.0), m.Refused)
    reply = world.core.evaluate(0, 0.0)
    world.deliver()
    assert "evaluation of version 0, 0 of 5 samples done" in reply.waiting_for
    training = [slot for slot in sorted(a.work) if slot[0] >= 0]
    for slot in training:  # makes room, and makes batch 0
        world.done(a, slot)
    assert [slot for slot in a.work if slot[0] < 0]
    assert numbers(world.get_batch(0)) == [0, 1]
    world.publish(1)
    assert not a.updates, "an update would change the weights under the evaluation"
    for _ in range(5):
        slot = next(slot for slot in sorted(a.work) if slot[0] < 0)
        assert a.work[slot].task.evaluation
        world.done(a, slot, reward=float(slot[0] % 2))
    assert [u.version for u in a.updates] == [1]
    result = world.core.evaluate(0, 0.0)
    assert (result.accuracy, result.samples, result.failed) == (3 / 5, 5, 0)
    assert world.core.evaluate(0, 0.0) == result


def test_an_evaluation_survives_its_worker_and_never_scores_a_failure():
    world = World(config(max_staleness=0, max_attempts=1), 50, evals=2)
    start(world, "a", 8)
    world.core.evaluate(0, 0.0)
    world.deliver()
    slot = next(slot for slot in sorted(world.workers["a"].work) if slot[0] < 0)
    world.fail(world.workers["a"], slot, "verifier_timeout")
    other = next(slot for slot in sorted(world.workers["a"].work) if slot[0] < 0)
    world.done(world.workers["a"], other, reward=1.0)
    result = world.core.evaluate(0, 0.0)
    assert (result.accuracy, result.samples, result.failed) == (1.0, 1, 1)


def test_an_evaluation_whose_weights_are_gone_ends_and_holds_nobody_back():
    """A publisher keeps two versions: a worker that comes after three would try to load the first one for ever."""
    world = World(config(max_staleness=8), 50, evals=2)
    a = start(world, "a", slots=40)
    finish(world, a, *running(world))
    world.die("a")
    world.core.evaluate(0, 0.0)
    for version in range(3):
        world.get_batch(version)
        world.publish(version + 1)
    b = world.join("b")
    assert [u.version for u in b.updates] == [3]
    refused = world.core.evaluate(0, 0.0)
    assert isinstance(refused, m.Refused) and "none can load it any more" in refused.reason


# --- Checkpoints and restarts --------------------------------------------------------------------------------------


def test_state_goes_on_with_the_same_groups_and_nothing_twice():
    world = World(config(), 30)
    a = start(world)
    world.train(2)
    while a.updates:
        world.load(a)
    finish(world, a, min(running(world)))
    saved = world.checkpoint(2)
    inflight = running(world)
    buffered = sorted(world.core.buffer.groups)
    world.train(3)
    world.workers.clear()
    world.resume(saved, new_controller=True)
    assert sorted(world.core.buffer.groups) == buffered
    b = start(world, "b")
    assert running(world)[: len(inflight)] == inflight, "the same numbers, so the same random numbers"
    assert len(b.work) and world.train(6)
    world.audit()


def test_state_of_other_data_is_refused_in_words():
    world, other = World(config(), 30), World(config(), 31)
    world.publish(0)
    data = world.core.get_state(0).data
    reply = other.core.set_state(m.SetState(version=0, data=data), 0.0)
    assert "size 30, this run has 31" in reply.reason
    assert "does not decode" in other.core.set_state(m.SetState(version=0, data=data[:-5]), 0.0).reason
    assert "expected format" in world.core.set_state(m.SetState(version=4, data=data), 0.0).reason
    assert isinstance(world.core.get_state(3), m.Refused)


def test_the_trainers_restart_keeps_finished_groups_and_refuses_lost_weights():
    world = World(config(max_staleness=3), 30)
    a = start(world)
    saved = world.checkpoint(0)
    finish(world, a, 0, 1, 2)
    assert world.train(1)
    world.resume(saved, new_controller=False)
    assert sorted(world.core.buffer.groups) == [2], "made by version 0, which the trainer goes on from"
    assert [u.version for u in a.updates][-1] == 0 and not a.work
    first = FakeWorker("z", 99, 4, version=1)  # has version 1 of the life that is lost
    world.workers["z"] = first
    world.core.hello(first.hello(), world.now)
    world.deliver()
    assert [u.version for u in first.updates] == [0] and not first.work


def test_a_trainer_without_checkpoint_starts_over():
    world = World(config(), 30)
    start(world)
    world.train(2)
    assert isinstance(world.core.publish(manifest(1), 0.0), m.Refused)
    world.consumed, world.batches, world.weights = [], {}, {}
    assert world.publish(0) == m.Published(version=0)
    assert world.train(3)
    world.audit()
    assert world.core.counters["trained_groups"] == 6


def test_the_next_controller_takes_over_where_one_was_killed():
    world = World(config(), 30)
    a = start(world)
    finish(world, a, 0, 1)
    a.grow((2, 0))
    batch = world.get_batch(0)
    world.journal_now()
    before = dict(a.work)
    world.kill_controller()
    assert a.work == before and a.version == 0 and not a.updates, "its work and its weights are its own"
    assert m.encode(world.get_batch(0)) == m.encode(batch), "the trainer may ask again"
    world.publish(1)
    assert world.train(5)
    world.audit()
    world.journal.remove()
    assert not world.journal.folder.exists()
