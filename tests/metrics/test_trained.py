"""The record of what was trained on: as written, across restarts, and without the steps that a resume made again."""

from types import SimpleNamespace

import numpy as np

from areal_jax.metrics.trained import TrainedGroup, TrainedWriter, last_trained, read_trained


def group(number, record, oldest=0):
    return SimpleNamespace(group=number, epoch=0, record_index=record, samples=[[], []], oldest_version=oldest)


def write(workdir, *steps):
    with TrainedWriter(workdir) as writer:
        for version, *groups in steps:
            writer.write(version, groups)


def test_every_step_is_read_as_it_was_written(tmp_path):
    assert read_trained(tmp_path) == {}
    write(tmp_path, (0, group(0, 5), group(1, 3)), (1, group(2, 4, oldest=1)))
    assert read_trained(tmp_path) == {
        0: [TrainedGroup(0, 5, 0, 2, 0), TrainedGroup(0, 3, 1, 2, 0)],
        1: [TrainedGroup(epoch=0, record=4, group=2, samples=2, oldest=1)],
    }


def test_the_same_samples_have_the_same_digest_and_no_others(tmp_path):
    def sampled(**changes):
        arrays = {"tokens": np.int32([1, 2]), "logprobs": np.float32([-1, -2]), "versions": np.int32([0, 0])}
        trajectory = SimpleNamespace(**arrays | {"reward": 1.0} | changes)
        return SimpleNamespace(**vars(group(0, 0)) | {"samples": [[trajectory]]})

    others = {"tokens": np.int32([1, 3]), "logprobs": np.float32([-1, -2.0000002]), "reward": 0.5}
    write(tmp_path, (0, sampled(), sampled(), *(sampled(**{name: value}) for name, value in others.items())))
    one, same, *different = (row.digest for row in read_trained(tmp_path)[0])
    assert one == same and len({one, *different}) == 4


def test_steps_made_again_after_a_checkpoint_count_once(tmp_path):
    write(tmp_path, (0, group(0, 0)), (1, group(1, 1)), (2, group(2, 2)), (3, group(3, 3)))
    write(tmp_path, (2, group(3, 3)))  # went back to version 2, where other groups were taken
    assert {v: [g.record for g in groups] for v, groups in read_trained(tmp_path).items()} == {0: [0], 1: [1], 2: [3]}


def test_half_a_line_of_a_killed_writer_is_no_step_and_harms_no_later_one(tmp_path):
    write(tmp_path, (0, group(0, 0)), (1, group(1, 1)))
    path = tmp_path / "trained.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert list(read_trained(tmp_path)) == [0]
    write(tmp_path, (1, group(2, 2)))
    assert [g.record for g in read_trained(tmp_path)[1]] == [2]


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    assert last_trained(tmp_path) == -1
    path = tmp_path / "trained.jsonl"
    path.write_text('{"version": 3, "groups": []}\n{"version": 2, "groups": []}\n{"version": 5')
    assert last_trained(tmp_path) == 2
    path.write_text("nothing of ours\n")
    assert last_trained(tmp_path) == -1
