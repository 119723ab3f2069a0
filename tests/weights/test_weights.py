"""A version arrives whole and exact, or not at all; and nothing is left behind."""

import errno
import os
import socket
import subprocess
import sys
import zlib

import ml_dtypes
import msgspec
import numpy as np
import psutil
import pytest

from areal_jax.transport.messages import Manifest, Publish, decode, encode
from areal_jax.weights import Publisher, WeightsRefused, cleanup, open_version, same_layout, store
from areal_jax.weights.file import NewFile


def tensors(seed=0, scale=1):
    draw = np.random.default_rng(seed).standard_normal
    return {
        "a": draw((3, 5 * scale)).astype(np.float32),
        "b.bias": draw(7).astype(ml_dtypes.bfloat16),
        "c": draw((4, 6)).astype(np.float16).T,  # not contiguous
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(3.5).reshape(()),
    }


@pytest.fixture(params=["shm", "disk"])
def publisher(request, tmp_path):
    (tmp_path / "shm").mkdir()
    with Publisher(tmp_path / "run", transport=request.param, shared_memory=tmp_path / "shm") as publisher:
        yield publisher


def same(version, expected):
    assert [name for name, _ in version] == list(expected)
    for name, array in version:
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes()


def test_every_dtype_and_layout_arrives_exactly(publisher):
    manifest = publisher.publish(3, tensors().items(), published_at=12.0)
    assert (manifest.version, manifest.published_at, manifest.host) == (3, 12.0, socket.gethostname())
    assert manifest.tensors[1].dtype == "bfloat16"
    with open_version(manifest) as version:
        same(version, tensors())
        assert set(version.timings) == {"read", "verify"} and not version["a"].flags.writeable
    assert set(publisher.timings) == {"convert", "copy", "megabytes"}


def test_what_the_source_of_the_tensors_has_measured_is_reported_apart(publisher):
    measured = {}

    def gathered():
        for name, array in tensors().items():
            measured["gather"] = measured.get("gather", 0.0) + 2.0  # as if each had taken two seconds
            yield name, array

    publisher.publish(0, gathered(), measured=measured)
    assert publisher.timings["gather"] == 10.0 and -10.0 < publisher.timings["convert"] < 0.0  # taken off there


def test_manifest_survives_the_wire(publisher):
    manifest = publisher.publish(0, tensors().items())
    assert decode(encode(Publish(manifest))).manifest == manifest
    assert msgspec.convert(msgspec.to_builtins(manifest), Manifest) == manifest


def test_newest_versions_are_kept_and_older_ones_are_gone(publisher):
    manifests = [publisher.publish(v, tensors(v).items()) for v in range(4)]
    for v in (2, 3):
        with open_version(manifests[v]) as version:
            same(version, tensors(v))
    for v in (0, 1):
        with pytest.raises(WeightsRefused, match=r"replaced by a newer|did not appear"):
            open_version(manifests[v], timeout=0)


def test_a_reader_keeps_its_version_whatever_is_published(publisher):
    held = open_version(publisher.publish(0, tensors(0).items()))
    view = held["a"]
    held.close()  # the view must keep the bytes, not the object that made it
    for v in range(1, 8):
        publisher.publish(v, tensors(v).items())
    np.testing.assert_array_equal(view, tensors(0)["a"])


def test_pages_are_used_again_when_nobody_reads_them(publisher):
    inodes = []
    for v in range(6):
        manifest = publisher.publish(v, tensors(v, scale=6 - v).items())
        inodes.append(os.stat(manifest.path).st_ino)
        name = store.file_name(v, manifest.tensors) if publisher.transport == "shm" else ""
        assert os.stat(manifest.path).st_size == manifest.nbytes + len(name)
        with open_version(manifest) as version:
            same(version, tensors(v, scale=6 - v))
    if publisher.transport == "shm":
        assert len(set(inodes)) == 3  # keep = 2, and one to write into


def test_a_flipped_byte_is_refused_and_named(publisher):
    manifest = publisher.publish(0, tensors().items())
    spec = manifest.tensors[2]
    with open(manifest.path, "r+b") as file:
        file.seek(spec.offset + 5)
        byte = file.read(1)[0]
        file.seek(spec.offset + 5)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(WeightsRefused, match=r"version 0: the bytes of c do not match"):
        open_version(manifest)
    with open_version(manifest, verify=False) as version:
        np.testing.assert_array_equal(version["a"], tensors()["a"])


def test_a_short_file_is_refused_and_named(publisher):
    manifest = publisher.publish(0, tensors().items())
    os.truncate(manifest.path, manifest.nbytes - 1)
    with pytest.raises(WeightsRefused, match="scalar is cut off" if publisher.transport == "disk" else "is gone"):
        open_version(manifest)


def test_what_has_taken_the_place_of_a_version_is_refused(publisher):
    """The number of a descriptor that was closed is given to the next file, socket or pipe."""
    manifest = publisher.publish(0, tensors().items())
    ends = os.pipe()
    with socket.socket() as taken:
        for fd in (taken.fileno(), *ends):
            with pytest.raises(WeightsRefused, match=r"version 0 (cannot be read|is gone)"):
                open_version(msgspec.structs.replace(manifest, path=f"/proc/{os.getpid()}/fd/{fd}"))
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize("change", [{"offset": -64}, {"offset": 1 << 40}, {"shape": (1 << 50,)}, {"dtype": "object"}])
def test_a_lying_manifest_is_refused(publisher, change):
    manifest = publisher.publish(0, tensors().items())
    tensor = msgspec.structs.replace(manifest.tensors[0], **change)
    with pytest.raises(WeightsRefused, match="version 0: a "):
        open_version(msgspec.structs.replace(manifest, tensors=[tensor]))


def test_layouts_are_compared_by_name(publisher):
    a = publisher.publish(0, tensors().items())
    same_layout(a, publisher.publish(1, tensors(1).items()))
    with pytest.raises(WeightsRefused, match=r"a is float32\[3, 10\], in version 0 it was float32\[3, 5\]"):
        same_layout(a, publisher.publish(2, tensors(scale=2).items()))
    with pytest.raises(WeightsRefused, match="scalar is missing"):
        same_layout(a, publisher.publish(3, list(tensors().items())[:-1]))


def test_what_cannot_be_published_leaves_nothing(publisher, tmp_path):
    before = publisher.publish(0, tensors().items())
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="a came twice"):
        publisher.publish(1, [*tensors().items(), ("a", np.zeros(2, np.float32))])
    with pytest.raises(ValueError, match="object, which is not carried"):
        publisher.publish(1, {"x": np.array([None])}.items())
    with pytest.raises(ValueError, match="has no tensors"):
        publisher.publish(1, [])

    def dies():
        yield "a", np.zeros(1 << 20, np.float32)
        raise RuntimeError("the device was lost")

    with pytest.raises(RuntimeError, match="device was lost"):
        publisher.publish(1, dies())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    files = [str(path) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ([before.path] if publisher.transport == "disk" else [])
    with open_version(before) as version:
        same(version, tensors())


def test_full_shared_memory_moves_to_the_workdir(tmp_path, monkeypatch):
    (tmp_path / "shm").mkdir()
    room, pwrite = [6 << 20], os.pwrite

    def limited(fd, data, offset):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path / "shm")):
            if room[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= len(data)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    big = {f"t{i}": np.full((1 << 18,), i, np.float32) for i in range(12)}
    with Publisher(tmp_path / "run", shared_memory=tmp_path / "shm") as publisher:
        for v in range(4):
            manifest = publisher.publish(v, big.items())
            assert manifest.path.startswith(str(tmp_path / "run"))
            with open_version(manifest) as version:
                same(version, big)
        assert len(list((tmp_path / "run" / "weights").iterdir())) == 2
    assert not (tmp_path / "run" / "weights").exists() and not list((tmp_path / "shm").iterdir())


def test_files_belong_to_their_owner_alone(publisher):
    manifest = publisher.publish(0, tensors().items())
    assert os.stat(manifest.path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(manifest.path)).st_mode & 0o077 in (0, 0o055)  # of /proc/PID/fd, or the disk's
    if publisher.transport == "disk":
        assert os.stat(os.path.dirname(manifest.path)).st_mode & 0o777 == 0o700


def test_a_planted_folder_is_not_used(tmp_path):
    folder = store.disk_folder(tmp_path)
    folder.symlink_to(tmp_path)
    with pytest.raises((PermissionError, FileExistsError)):
        Publisher(tmp_path, transport="disk")


def test_a_killed_publisher_leaves_nothing_in_shared_memory(tmp_path):
    """It may be killed at any moment, and with it everybody who could clean up: in the middle of a version, too."""
    script = f"""
import numpy as np
from pathlib import Path
from areal_jax.weights import Publisher
publisher = Publisher({str(tmp_path)!r}, shared_memory=Path({str(tmp_path)!r}))
print(publisher.publish(0, [("a", np.ones(9, np.float32))]).path, flush=True)
def never_ends():
    yield "a", np.ones(1 << 20, np.float32)
    print("half", flush=True)
    while True: pass
publisher.publish(1, never_ends())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    path = process.stdout.readline().strip()
    assert process.stdout.readline() == "half\n"
    assert os.path.exists(path) and not list(tmp_path.iterdir())  # there, but not by any name
    process.kill()
    process.communicate()
    assert not os.path.exists(path) and not list(tmp_path.iterdir())


def test_thousands_of_versions_leave_memory_and_descriptors_flat(publisher):
    """Publisher, receiver, and readers that keep a version for a while."""
    me, held, after_warm_up = psutil.Process(), [], None
    for v in range(2000 if publisher.transport == "shm" else 400):
        held.append(open_version(publisher.publish(v % 50, tensors(0).items())))
        if len(held) == 3:
            held.pop(0).close()
        if v == 200:
            after_warm_up = me.num_fds(), len(me.memory_maps(grouped=False)), me.memory_info().rss
    assert me.num_fds() == after_warm_up[0]
    assert len(me.memory_maps(grouped=False)) <= after_warm_up[1] + 5  # of the allocator
    assert me.memory_info().rss < after_warm_up[2] + (8 << 20)
    for version in held:
        version.close()


def test_what_killed_processes_left_on_the_disk_is_cleaned_up(tmp_path):
    """A killed publisher leaves `weights/` in the workdir; `cleanup`, or the next publisher of the run, removes it."""
    folder = store.make_private(store.disk_folder(tmp_path))
    (folder / "v00000001-00000000.weights").write_bytes(b"old")
    assert cleanup(tmp_path) == [folder] and cleanup(tmp_path) == []
    (store.make_private(folder) / "v00000001-00000000.weights").write_bytes(b"old")
    with Publisher(tmp_path, shared_memory=tmp_path):
        assert not folder.exists()


def test_checksums_are_crc32_of_the_bytes(publisher):
    manifest = publisher.publish(0, tensors().items())
    for spec in manifest.tensors:
        assert spec.checksum == zlib.crc32(np.ascontiguousarray(tensors()[spec.name]).tobytes())
        assert spec.offset % store.ALIGNMENT == 0


def test_a_version_published_again_with_other_bytes_is_another_file(publisher):
    old = publisher.publish(5, tensors(0).items())
    new = publisher.publish(5, tensors(1).items())
    with open_version(new) as version:
        same(version, tensors(1))
    with pytest.raises(WeightsRefused):
        open_version(old, timeout=0)


def test_another_host_is_told_what_to_do(publisher):
    manifest = publisher.publish(0, tensors().items())
    if publisher.transport == "shm":
        with pytest.raises(WeightsRefused, match=r"not on this host.*'tcp' or 'disk'"):
            open_version(manifest, host="elsewhere")
    else:
        with open_version(manifest, host="elsewhere") as version:
            same(version, tensors())


def test_a_move_to_a_full_disk_leaves_neither_a_file_nor_a_descriptor_that_holds_the_room(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("areal_jax.weights.file.os.pwrite", no_room)
    monkeypatch.setattr("areal_jax.weights.file.shutil.copyfileobj", no_room)
    with pytest.raises(OSError, match="No space") as raised, NewFile(store.SHARED_MEMORY, tmp_path / "w") as file:
        file.write(memoryview(b"x"), 0)
    assert raised.value.filename == str(tmp_path / "w") and not list((tmp_path / "w").iterdir())
    assert os.listdir("/proc/self/fd") == before
