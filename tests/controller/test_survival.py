"""The controller's decisions when workers come and go, epochs end, evaluations run, and processes are started again."""

import pytest

from areal_jax.controller import members
from areal_jax.transport import messages as m

from .simulation import FakeWorker, World, manifest, trajectory
from .situations import config, finish, numbers, running, start

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


def unreachable(world, name):
    """A message to it found nobody; that it had died is known when its successor comes."""
    world.cut(name)


DEATHS = {"silent": World.die, "goodbye": lambda w, name: w.leave(name, died=True), "unreachable": unreachable}


@pytest.mark.parametrize("die", DEATHS.values(), ids=DEATHS)
def test_a_prompt_that_kills_its_workers_is_put_away_and_the_others_are_not(die):
    world = World(config(max_attempts=2, group_size=1, batch_size=2, max_staleness=3), 40)
    crashes = 0
    for _ in range(12):
        worker = start(world, "w", slots=3)
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
    assert (world.core.counters["workers_died"], world.core.counters["workers_left"]) == (4, 0)
    assert world.train(3)
    world.audit()


def test_a_worker_that_was_cut_off_for_a_while_has_not_died():
    world = World(config(max_attempts=1), 20)
    a = start(world)
    had = set(a.work)
    for _ in range(5):
        world.rejoin(world.cut("a"))
    assert set(a.work) == had and not world.core.counters["workers_died"]
    assert not any(group.prompt.deaths for group in world.core.ledger.open.values())


@pytest.mark.parametrize("died", [False, True])
def test_a_worker_that_says_how_it_ended_is_believed_though_no_message_reaches_it(died):
    world = World(config(), 20)
    start(world, "a", 4)
    world.cut("a")
    world.core.goodbye("a", world.now, died=died)
    world.core.goodbye("a", world.now, died=died)
    start(world, "a", 4)
    assert (world.core.counters["workers_died"], world.core.counters["workers_left"]) == (died, not died)
    prompts = [group.prompt for group in world.core.ledger.open.values()]
    assert sum(prompt.deaths for prompt in prompts) == 4 * died


def test_workers_of_which_nothing_is_ever_heard_again_are_not_remembered_for_ever():
    world = World(config(), 20)
    for i in range(members.UNREACHED + 3):
        world.join(f"guest-{i}")
        world.cut(f"guest-{i}")
    assert len(world.core.unreached) == members.UNREACHED and "guest-3" in world.core.unreached


def test_a_prompt_is_not_put_away_for_a_death_that_is_known_only_after_its_end():
    world = World(config(max_attempts=1, group_size=1, batch_size=1), 20)
    for _ in range(2):
        a = start(world, "a", slots=1)
        world.die("a")
    a = start(world, "a", slots=1)
    (slot,) = a.work
    unreachable(world, "a")
    b = start(world, "b", slots=1)
    assert set(b.work) == {slot}
    world.done(b, slot)
    start(world, "a")
    assert world.core.counters["workers_died"] == 3 and not world.core.counters["quarantined"]
    world.train(3)
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


def test_after_a_restart_a_step_reports_its_own_losses_and_not_those_of_the_whole_run():
    world = World(config(dynamic_filter=True), 30)
    a = start(world)
    finish(world, a, 0, 1, reward=1.0)
    for group, sample in sorted(a.work):
        world.done(a, (group, sample), float(sample))
    assert world.get_batch(0).report["rollout/filtered"] == 2
    world.publish(1)
    saved = world.checkpoint(1)
    for restart in (world.kill_controller, lambda: world.resume(saved, new_controller=True)):
        restart()
        report = world.get_batch(1).report
        assert (report["rollout/filtered"], report["rollout/filtered_total"]) == (0, 2)


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
