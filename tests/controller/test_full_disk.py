"""A disk too full for the journal: nobody is told what it would have to hold; the run goes on, or ends by its limit."""

import asyncio
import dataclasses
import errno
import shutil

import pytest

from areal_jax.controller import service
from areal_jax.controller.core import Core
from areal_jax.controller.journal import Journal
from areal_jax.controller.service import Service
from areal_jax.disk import NO_ROOM
from areal_jax.transport import messages as m
from areal_jax.transport.errors import RequestRefused
from areal_jax.transport.sockets import Peer, Server, SyncClient

from .simulation import manifest
from .test_service import CONFIG, RECORDS, NetWorker


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(service, "LONG_POLL", 0.05)
    monkeypatch.setattr(service, "LAST_WORDS", 0.2)


class FullDisk(Journal):
    """Takes nothing while `full`."""

    full, refused = False, 0

    def _write(self, path, data):
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super()._write(path, data)


def run(workdir, train, limit):
    """A controller with `FullDisk`, a worker, and `train(client, journal)` in a thread; its value, the diagnosis.

    `journal.core` is the controller's.
    """

    async def body():
        clock = asyncio.get_running_loop().time
        core = Core(dataclasses.replace(CONFIG, disk_limit=limit), RECORDS, [], now=clock())
        journal = FullDisk(workdir)
        journal.core = core
        async with Server("tcp://127.0.0.1:*", "controller", workdir) as server:
            serving = asyncio.create_task(Service(core, server, clock, journal).run())
            worker = asyncio.create_task(NetWorker("rollout-0", workdir).run())

            def trainer():
                with SyncClient("trainer-0", workdir, resend=0.2) as client:
                    return train(client, journal)

            try:
                found = await asyncio.to_thread(trainer)
            except BaseException:
                core.stop("the test has failed")
                raise
            finally:
                diagnosis = await serving
                await worker
            return found, diagnosis

    return asyncio.run(asyncio.wait_for(body(), 60))


def until(client, message, kind):
    while not isinstance(reply := client.request(message, 10), kind):
        assert isinstance(reply, m.NotReady), reply
    return reply


def test_no_batch_and_no_version_is_told_before_it_is_written_and_then_all_goes_on(tmp_path):
    def train(client, journal):
        until(client, m.Publish(manifest(0)), m.Published)
        until(client, m.GetBatch(0), m.Batch)
        journal.full = True
        refusal = client.request(m.Publish(manifest(1)), 10)
        assert str(tmp_path / "controller") in refusal.waiting_for  # the ledger, or a group that was just finished
        assert "cannot be written: No space left on device" in refusal.waiting_for
        assert "cannot be written" in client.request(m.GetStatus(), 10).data["disk"]
        for _ in range(3):  # though it has been formed by now
            assert client.request(m.GetBatch(1), 10).disk
        journal.full = False
        until(client, m.Publish(manifest(1)), m.Published)
        batch = until(client, m.GetBatch(1), m.Batch)
        status = client.request(m.GetStatus(), 10).data
        assert status["disk"] == "" and any("takes writes again" in note for note in status["notes"])
        client.request(m.Finish(), 10)
        return batch

    batch, diagnosis = run(tmp_path, train, limit=30.0)
    assert diagnosis is None and len(batch.groups) == CONFIG.batch_size


def test_a_batch_that_could_not_be_written_is_not_told_when_it_is_asked_for_again(tmp_path):
    def train(client, journal):
        until(client, m.Publish(manifest(0)), m.Published)
        while len(list((tmp_path / "controller" / "groups").iterdir())) < CONFIG.batch_size:
            client.request(m.GetStatus(), 10)
        journal.full = True
        replies = [client.request(m.GetBatch(0), 10) for _ in range(3)]
        journal.full = False
        until(client, m.GetBatch(0), m.Batch)
        client.request(m.Finish(), 10)
        return replies

    replies, _ = run(tmp_path, train, limit=30.0)
    assert all(isinstance(reply, m.NotReady) and "cannot be written" in reply.waiting_for for reply in replies)


def test_a_state_that_could_not_be_written_is_restored_once_however_often_it_is_sent(tmp_path):
    def train(client, journal):
        until(client, m.Publish(manifest(0)), m.Published)
        batch = until(client, m.GetBatch(0), m.Batch)
        state = client.request(m.GetState(0), 10).data
        journal.full = True
        for _ in range(5):
            assert isinstance(client.request(m.SetState(version=0, data=state), 10), m.NotReady)
        lives, unwritten = journal.core.lives, len(journal.core.just_finished)
        journal.full = False
        until(client, m.SetState(version=0, data=state), m.Published)
        until(client, m.Publish(manifest(0)), m.Published)
        again = until(client, m.GetBatch(0), m.Batch)
        client.request(m.Finish(), 10)
        return lives, unwritten, len(batch.groups) - len(again.groups)

    (lives, unwritten, missing), diagnosis = run(tmp_path, train, limit=30.0)
    assert lives == 1 and missing == 0 and diagnosis is None
    assert CONFIG.batch_size <= unwritten <= len(RECORDS)  # each finished group waits for room once


def test_a_controller_killed_while_the_disk_is_full_is_followed_by_one_that_knows_all_that_was_told(tmp_path):
    def train(client, journal):
        until(client, m.Publish(manifest(0)), m.Published)
        batch = until(client, m.GetBatch(0), m.Batch)
        journal.full = True
        assert isinstance(client.request(m.Publish(manifest(1)), 10), m.NotReady)
        shutil.copytree(tmp_path / "controller", tmp_path / "next" / "controller")  # all that a killed one leaves
        journal.full = False
        client.request(m.Finish(), 10)
        return batch

    batch, _ = run(tmp_path, train, limit=30.0)
    core = Core(CONFIG, RECORDS, [], incarnation=1)
    assert Journal(tmp_path / "next").recover(core, 0.0)
    assert core.version == 0  # nobody was told of version 1
    told = {group.group: group.samples for group in batch.groups}
    known = {group.group: group.samples for group in core.get_batch(0, 0.0).groups}
    assert told.keys() == known.keys() and len(known) == CONFIG.batch_size
    assert isinstance(core.publish(manifest(1), 0.0), m.Published)


def test_a_disk_that_stays_full_ends_the_run_with_a_diagnosis_that_names_the_file(tmp_path):
    def train(client, journal):
        until(client, m.Publish(manifest(0)), m.Published)
        journal.full = True
        with pytest.raises(RequestRefused, match="cannot be written"):
            until(client, m.GetBatch(0), m.Batch)
        return journal.refused

    refused, diagnosis = run(tmp_path, train, limit=0.5)
    assert str(tmp_path / "controller") in diagnosis and "No space left on device; tried for" in diagnosis
    assert "controller.disk_limit" in diagnosis and refused < 10  # it is not tried all the time


def test_whoever_waits_while_the_disk_is_full_is_told_so_whatever_it_waits_for(tmp_path):
    async def body():
        core, journal = Core(CONFIG, RECORDS, []), FullDisk(tmp_path)
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            service = Service(core, server, lambda: 0.0, journal)
            journal.full = True
            assert service._handle(Peer(b"trainer-0"), m.Publish(manifest(0))).disk
            replies = [service._ask(m.GetBatch(0), 0.0)]
            journal.full = False
            service._write_journal(1.0)
            return [*replies, service._ask(m.GetBatch(0), 1.0)]

    replies = asyncio.run(asyncio.wait_for(body(), 30))
    assert [("rollout worker" in reply.waiting_for, reply.disk) for reply in replies] == [(True, True), (True, False)]


def test_a_trainer_that_waits_for_room_is_not_taken_for_one_that_hangs(tmp_path):
    """The limit of a full disk is not cut short by that of no progress, though the journal has room."""

    async def body():
        now, ticked = 0.0, asyncio.Event()
        core = Core(dataclasses.replace(CONFIG, progress_limit=50.0, heartbeat_limit=1000.0), RECORDS, [])
        core.hello(m.Hello(role="trainer", name="trainer-0", host="h", pid=1), now)
        tick = core.tick
        core.tick = lambda at: (tick(at), ticked.set())
        async with Server("tcp://127.0.0.1:*", "controller", tmp_path) as server:
            serving = asyncio.create_task(Service(core, server, lambda: now).run())
            for phase, seconds in (("checkpointing", 40.0), (NO_ROOM, 60.0), (NO_ROOM, 60.0), ("idle", 60.0)):
                assert core.stopped is None
                core.heartbeat(m.Heartbeat(name="trainer-0", phase=phase), now)
                now += seconds
                ticked.clear()
                await ticked.wait()
            await serving
        return core.stopped

    assert "controller.progress_limit" in asyncio.run(asyncio.wait_for(body(), 30))
