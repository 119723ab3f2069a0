"""A full disk is waited for, within a limit, and the diagnosis names the file."""

import errno
import os

import pytest

from areal_jax.disk import DiskFull, insist, no_waiting, release, reserve, write_whole

NO_ROOM = OSError(errno.ENOSPC, "No space left on device", "/run/trained.jsonl")


class World:
    """A disk that takes nothing until `room_at` seconds, and a clock that sleeping moves."""

    def __init__(self, room_at, seconds=0.0):
        self.now, self.room_at, self.seconds, self.tries = 0.0, room_at, seconds, 0

    def write(self):
        self.tries += 1
        self.now += self.seconds
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


def test_what_takes_long_to_write_is_not_written_all_the_time_and_who_watches_is_told():
    world, told = World(room_at=100.0, seconds=9.0), []
    assert world.insist(300.0, tell=told.append) == "written"
    assert world.tries == 7  # not one after the other, which would be 12
    assert told == ["/run/trained.jsonl cannot be written: No space left on device"] * 6 + [""]


def test_who_may_not_wait_says_at_once_which_file_it_is_about():
    why = r"^/run/trained.jsonl cannot be written: No space left on device; several trainer processes do not wait"
    with pytest.raises(DiskFull, match=why), no_waiting():
        World(room_at=100.0).write()


def test_room_is_kept_and_given_back(tmp_path):
    reserve(tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_blocks * 512 >= kept.stat().st_size >= 1 << 16
    release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_file_whole_and_no_draft(tmp_path, monkeypatch):
    def broken(fd, mode):
        os.write(fd, b"ha")
        os.close(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "ledger", "before", mode=0o600)
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "fdopen", broken)
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_whole(tmp_path / "ledger", b"after")
    assert raised.value.filename == str(tmp_path / "ledger")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("ledger", "before")]
