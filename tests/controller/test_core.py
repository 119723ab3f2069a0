"""The controller's decisions, event by event: weights, batches, failures."""

import numpy as np
import pytest

from areal_jax.controller.fleet import Fleet, Worker
from areal_jax.transport import messages as m

from .simulation import World, trajectory
from .situations import config, finish, numbers, running, start

# --- Weights and assignment ----------------------------------------------------------------------------------------


def test_the_first_weights_come_before_the_first_task():
    world = World(config(group_size=3), 10)
    worker = world.join("a", slots=4)
    assert not worker.work and not worker.updates
    world.publish(0)
    assert [u.version for u in worker.updates] == [0] and not worker.work
    world.load(worker)
    assert running(world) == [0, 1, 2], "room for eight samples: two groups of three, and part of a third"


def test_nothing_is_generated_beyond_the_runs_last_step():
    """Of three steps of two groups each: six groups, and a seventh only in the place of one that was put away."""
    world = World(config(max_staleness=9, max_attempts=1), 20)
    world.core.steps = 3
    worker = start(world, slots=40)
    assert running(world) == [0, 1, 2, 3, 4, 5], "the staleness gate alone would let twenty in"
    world.fail(worker, (1, 0))
    assert running(world) == [0, 2, 3, 4, 5, 6]
    for step, groups in enumerate([(0, 2), (3, 4), (5, 6)]):
        finish(world, worker, *groups)
        assert numbers(world.get_batch(step)) == [*groups]
        world.publish(step + 1)
    assert not worker.work and world.core.capacity == 0


def test_the_first_worker_to_load_new_weights_leaves_work_to_the_other():
    world = World(config(batch_size=8, max_staleness=0), 20)  # sixteen samples, for two workers of eight slots
    first, second = world.join("a", slots=8), world.join("b", slots=8)
    world.publish(0)
    while loading := [worker for worker in (first, second) if worker.updates]:
        world.load(loading[0])
    assert (len(first.work), len(second.work)) == (10, 6)


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


def test_a_large_fleet_loads_an_eighth_at_once():
    manifest = m.Manifest(version=1, nbytes=0, tensors=[], path="", host="", transport="shm", url="", published_at=0.0)
    fleet = Fleet(workers={str(i): Worker(str(i), slots=4, version=0) for i in range(24)})
    for expected in (3, 0):
        told = fleet.to_update(manifest, set(), 0.0)
        assert len(told) == expected
        for worker in told:
            worker.updating = 1


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
    assert world.core.counters["overtaken_loads"] == 1 and not world.core.failed, "that is no failure"
    world.load(worker, error="version 2 is gone")
    assert not worker.updates  # but not for ever
    assert world.core.counters["overtaken_loads"] == 1 and world.core.failed == {"weights_refused": 1}


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
