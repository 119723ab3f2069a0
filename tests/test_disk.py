"""A full disk is waited for, within a limit, and the diagnosis names the file."""

import errno

import pytest

from areal_jax.disk import DiskFull, insist

NO_ROOM = OSError(errno.ENOSPC, "No space left on device", "/run/trained.jsonl")


class World:
    """A disk that takes nothing until `room_at` seconds, and a clock that sleeping moves."""

    def __init__(self, room_at):
        self.now, self.room_at, self.tries = 0.0, room_at, 0

    def write(self):
        self.tries += 1
        if self.now < self.room_at:
            raise NO_ROOM
        return "written"

    def sleep(self, seconds):
        self.now += seconds

    def insist(self, limit, **options):
        return insist(self.write, limit, sleep=self.sleep, clock=lambda: self.now, **options)


def test_a_write_is_tried_until_there_is_room(caplog):
    world = World(room_at=7.0)
    assert world.insist(10.0) == "written" and world.now == 7.0
    first, last = (record.getMessage() for record in caplog.records)  # not one for each try
    assert "/run/trained.jsonl cannot be written: No space left on device" in first and "again" in last


def test_the_wait_is_bounded_and_names_the_file():
    world = World(room_at=100.0)
    with pytest.raises(DiskFull, match=r"^/run/trained.jsonl cannot be written: No space left on device; tried for 10"):
        world.insist(10.0)
    assert world.now <= 11.0


def test_who_is_told_to_stop_does_not_wait():
    world = World(room_at=100.0)
    with pytest.raises(DiskFull, match=r"told to stop while /run/trained\.jsonl"):
        world.insist(10.0, stop=lambda: world.now >= 2.0)
    assert world.now == 2.0
