"""Whole lines only, whatever the disk does; and readers that read each of them once."""

import errno
import json
import os

import pytest
from test_trained import group

from areal_jax.metrics import lines
from areal_jax.metrics.clock import Clock
from areal_jax.metrics.lines import Lines
from areal_jax.metrics.trained import TrainedGroup, TrainedWriter, read_trained
from areal_jax.metrics.writers import MetricsReader, MetricsWriter


@pytest.fixture
def disk(monkeypatch):
    """`disk["room"]` bytes can still be written, to any file; a write takes what fits and the next one fails."""
    state, write = {"room": 10**9}, os.write

    def limited(fd, data):
        if state["room"] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[: state["room"]])
        state["room"] -= written
        return written

    monkeypatch.setattr(lines.os, "write", limited)
    return state


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, disk):
    file = Lines(tmp_path / "x.jsonl")
    file.append({"a": 1})
    disk["room"] = 5
    with pytest.raises(OSError, match=r"x\.jsonl"):
        file.append({"a": 2})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n'
    disk["room"] = 10**9
    file.append({"a": 3})
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [{"a": 1}, {"a": 3}]


def test_half_a_line_that_could_not_even_be_taken_back_is_cut_off_later(tmp_path, disk, monkeypatch):
    file, truncate = Lines(tmp_path / "x.jsonl"), os.ftruncate
    file.append({"a": 1})
    disk["room"] = 5

    def refuse(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(lines.os, "ftruncate", refuse)
    assert not file.add({"a": 2}) and "x.jsonl cannot be written: No space left" in file.problem
    monkeypatch.setattr(lines.os, "ftruncate", truncate)
    disk["room"] = 10**9
    assert file.add({"a": 3}) and file.problem == ""
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_lines_beyond_those_that_may_wait_are_counted_and_never_said_to_be_there(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(lines, "_KEPT", 3)
    file = Lines(tmp_path / "x.jsonl")
    disk["room"] = 0
    assert not any([file.add(i) for i in range(5)])
    lost = "; 2 lines are lost, as more than 3 had to wait for room"
    assert file.problem.endswith("x.jsonl cannot be written: No space left on device" + lost)
    disk["room"] = 10**9
    assert file.add(5) and file.problem.endswith("x.jsonl is not whole" + lost)
    assert (tmp_path / "x.jsonl").read_text().split() == ["2", "3", "4", "5"]


def test_a_long_unfinished_line_of_a_killed_writer_is_cut_off(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": "' + "x" * 200_000)
    Lines(tmp_path / "x.jsonl").append({"a": 2})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_no_metric_and_no_timeline_ends_a_run(tmp_path, disk):
    clock = Clock(trace=tmp_path / "timeline" / "x.jsonl")
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": 1.0})
        clock.enter("training")
        disk["room"] = 0
        writer.write(2, {"a": 2.0})
        clock.enter("idle")
        assert writer.problem.endswith("metrics.jsonl cannot be written: No space left on device")
        disk["room"] = 10**9
        writer.write(3, {"a": 3.0})
        clock.enter("training")
    reader = MetricsReader(tmp_path)
    assert reader.read() == [1, 2, 3]
    spans = [json.loads(line)["phase"] for line in (tmp_path / "timeline" / "x.jsonl").read_text().splitlines()]
    assert spans == ["starting", "training", "idle"]


def test_tensorboard_on_a_full_disk_loses_events_and_goes_on(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": 1.0})

        def no_room(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(type(writer._tensorboard._file), "write_event", no_room)
        writer.write(2, {"lost": 2.0})
        monkeypatch.undo()
        writer.write(3, {"kept": 3.0})
    events = b"".join(path.read_bytes() for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert b"kept" in events and b"lost" not in events


def test_a_step_that_could_not_be_recorded_is_recorded_once_there_is_room(tmp_path, disk):
    with TrainedWriter(tmp_path) as writer:
        writer.write(0, [group(0, 5)])
        disk["room"] = 20
        with pytest.raises(OSError, match=r"trained\.jsonl"):
            writer.write(1, [group(1, 3)])
        assert read_trained(tmp_path) == {0: [TrainedGroup(0, 5, 0, 2, 0)]}
        disk["room"] = 10**9
        writer.write(1, [group(1, 3)])
    assert list(read_trained(tmp_path)) == [0, 1]


def test_a_reader_reads_what_was_appended_and_nothing_twice(tmp_path, monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr("areal_jax.metrics.writers.json.loads", lambda line: parsed.append(line) or loads(line))
    reader = MetricsReader(tmp_path, keep=("a",))
    assert reader.read() == [] and reader.rows == []
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": 1, "b": 2})
        assert reader.read() == [1] and reader.rows == [{"step": 1, "a": 1}]
        writer.write(2, {"a": 3})
        writer.write(1, {"a": 5})
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 3, "a"')  # the writer is at work
        assert reader.read() == [2, 1] and reader.read() == []
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(": 7}\n")
        assert reader.read() == [3]
    assert reader.rows == [{"step": 1, "a": 5}, {"step": 2, "a": 3}, {"step": 3, "a": 7}]
    assert len(parsed) == 4
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')  # another file
    assert reader.read() == [9] and reader.rows == [{"step": 9}]
