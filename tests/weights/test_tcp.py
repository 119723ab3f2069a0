"""Between hosts a version is pulled once per host, goes on after an interruption, and needs the run's keys.

The other host is played by another name and another folder for its shared memory.
"""

import concurrent.futures
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from areal_jax.transport.endpoints import load_keys, make_keys
from areal_jax.transport.errors import KeysMissing
from areal_jax.weights import Publisher, WeightsRefused, copies, open_version, store, tcp

MEGABYTE = 1 << 20


def tensors(version=0, megabytes=9):
    draw = np.random.default_rng(version).integers
    return {f"t{i}": draw(0, 255, MEGABYTE, dtype=np.uint8) for i in range(megabytes)} | {"odd": np.arange(3.0)}


@pytest.fixture
def hosts(tmp_path):
    for name in ("here", "there", "run"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def publisher(hosts):
    with Publisher(hosts / "run", transport="tcp", shared_memory=hosts / "here") as publisher:
        yield publisher


def open_there(manifest, hosts, **options):
    options = {"timeout": 10.0, "host": "there", "workdir": hosts / "run", "shared_memory": hosts / "there"} | options
    return open_version(manifest, **options)


def copied(hosts):
    return sorted(p.name for p in store.run_folder(hosts / "run", hosts / "there").iterdir() if p.suffix == ".weights")


@pytest.fixture
def served(monkeypatch):
    """Every range that the server was asked for."""
    ranges, answer = [], tcp.ByteServer._answer

    def count(self, parts):
        ranges.append(tcp._REQUEST.unpack(parts[2]))
        answer(self, parts)

    monkeypatch.setattr(tcp.ByteServer, "_answer", count)
    return ranges


def test_another_host_gets_the_same_bytes(publisher, hosts):
    with open_there(publisher.publish(1, tensors(1).items()), hosts) as version:
        assert str(version.path).startswith(str(hosts / "there"))
        for name, array in tensors(1).items():
            assert version[name].dtype == array.dtype
            np.testing.assert_array_equal(version[name], array)


def test_a_host_pulls_once_for_all_its_workers(hosts, served):
    with Publisher(hosts / "run", transport="tcp", shared_memory=hosts / "here") as publisher:
        manifest = publisher.publish(1, tensors().items())
        with concurrent.futures.ThreadPoolExecutor(6) as workers:
            versions = list(workers.map(lambda _: open_there(manifest, hosts), range(6)))
        assert len({os.stat(v.path).st_ino for v in versions}) == 1
        assert sum(size for _, size in served) == manifest.nbytes
        for version in versions:
            version.close()


def test_a_pull_may_end_between_two_looks_of_those_who_wait_for_it(tmp_path, monkeypatch):
    path, exists = tmp_path / "v1.weights", Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.suffix == ".part" or exists(self))  # and then it was renamed
    with open(tmp_path / "pulling", "wb") as puller:
        fcntl.flock(puller, fcntl.LOCK_EX)
        end = threading.Timer(0.1, path.touch)
        end.start()
        with copies._only_one(tmp_path / "pulling", path, 10.0) as must_pull:
            assert not must_pull
        end.join()


def test_a_version_on_a_shared_disk_is_copied_once_per_host_and_outlives_the_file(hosts, monkeypatch):
    """NFS would kill whoever touches a page of a mapped file that another host has removed."""
    read, opened = shutil.copyfileobj, []
    monkeypatch.setattr(shutil, "copyfileobj", lambda source, *more: (opened.append(source.name), read(source, *more)))
    with Publisher(hosts / "run", transport="disk") as publisher:
        manifest = publisher.publish(1, tensors().items())
        with open_there(manifest, hosts) as version, open_there(manifest, hosts):
            Path(manifest.path).unlink()
            np.testing.assert_array_equal(version["t7"], tensors()["t7"])
        assert [str(name) for name in opened] == [manifest.path] and copied(hosts) == [Path(manifest.path).name]
        newer = publisher.publish(2, tensors(2).items())
        os.truncate(newer.path, 100)
        with pytest.raises(WeightsRefused, match="shows 100 of"):
            open_there(newer, hosts)


def test_a_host_without_room_says_what_to_do(publisher, hosts, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tcp, "_fetch", full)
    with pytest.raises(WeightsRefused, match=r"version 1 has 0\.0 GB, and .*there room for .*--shm-size"):
        open_there(publisher.publish(1, tensors().items()), hosts)


def test_an_interrupted_pull_goes_on_where_it_stopped(hosts, served):
    with Publisher(hosts / "run", transport="tcp", shared_memory=hosts / "here") as publisher:
        manifest = publisher.publish(1, tensors().items())
        path = store.run_folder(hosts / "run", hosts / "there") / store.file_name(1, manifest.tensors)
        store.make_private(path.parent)
        with open(manifest.path, "rb") as whole:  # a puller was killed after five megabytes
            path.with_suffix(".part").write_bytes(whole.read(5 * MEGABYTE))
        with open_there(manifest, hosts) as version:
            np.testing.assert_array_equal(version["t7"], tensors()["t7"])
        assert min(offset for offset, _ in served) == 5 * MEGABYTE


def test_a_lost_connection_is_made_again(hosts, monkeypatch):
    """The server answers nothing for a while, then less than was asked for: the puller asks again for the rest."""
    answer, calls = tcp.ByteServer._answer, []

    def unreliable(self, parts):
        calls.append(parts)
        if len(calls) not in (2, 3, 5):
            answer(self, parts)

    monkeypatch.setattr(tcp.ByteServer, "_answer", unreliable)
    monkeypatch.setattr(tcp, "_ASK_AGAIN", 0.2)
    monkeypatch.setattr(tcp, "_CHUNK", MEGABYTE)
    with (
        Publisher(hosts / "run", transport="tcp", shared_memory=hosts / "here") as publisher,
        open_there(publisher.publish(1, tensors().items()), hosts) as version,
    ):
        np.testing.assert_array_equal(version["t7"], tensors()["t7"])


def test_a_serving_thread_that_hangs_does_not_hold_up_the_end(hosts, monkeypatch, caplog):
    asked, go_on = threading.Event(), threading.Event()

    def hang(self, parts):
        asked.set()
        go_on.wait(60)  # a disk that does not answer

    monkeypatch.setattr(tcp.ByteServer, "_answer", hang)
    monkeypatch.setattr(tcp, "_CLOSE_SECONDS", 0.1)
    server = tcp.ByteServer("tcp://127.0.0.1:*")
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(server.url)
        sock.send(b"")
        assert asked.wait(60)
        server.close()
    assert f"the thread that serves weights at {server.url} has not ended" in caplog.text
    go_on.set()
    server._thread.join(60)


def test_bytes_that_change_on_the_way_are_refused_and_pulled_anew(hosts, monkeypatch):
    pread, flip = os.pread, [True]

    def flipped(fd, size, offset):
        data = bytearray(pread(fd, size, offset))
        data[-1] ^= flip[0]
        return bytes(data)

    with Publisher(hosts / "run", transport="tcp", shared_memory=hosts / "here") as publisher:
        manifest = publisher.publish(1, tensors().items())
        monkeypatch.setattr(os, "pread", flipped)
        with pytest.raises(WeightsRefused, match="do not match their checksum"):
            open_there(manifest, hosts)
        assert not copied(hosts)
        flip[0] = False
        open_there(manifest, hosts).close()


def test_a_version_that_is_gone_is_refused(publisher, hosts):
    manifests = [publisher.publish(v, tensors(v, 1).items()) for v in range(4)]
    with pytest.raises(WeightsRefused, match="version 0 is gone"):
        open_there(manifests[0], hosts)
    for manifest in manifests[2:]:
        open_there(manifest, hosts).close()
    publisher.publish(4, tensors(4, 1).items())
    open_there(publisher.publish(5, tensors(5, 1).items()), hosts).close()
    assert len(copied(hosts)) == 2  # the two newest


def test_a_dead_trainer_is_named(publisher, hosts):
    manifest = publisher.publish(0, tensors().items())
    publisher._server.close()
    with pytest.raises(WeightsRefused, match=r"tcp://127.0.0.1:\d+ sent nothing for 0.3 s, after 0 of"):
        open_there(manifest, hosts, timeout=0.3)


def test_beyond_loopback_keys_are_needed_and_only_the_runs_keys_help(hosts):
    with pytest.raises(KeysMissing):
        Publisher(hosts / "run", transport="tcp", address="tcp://0.0.0.0:*", shared_memory=hosts / "here")
    make_keys(hosts / "run")
    make_keys(hosts / "other")
    with Publisher(
        hosts / "run", transport="tcp", address="tcp://0.0.0.0:*", shared_memory=hosts / "here"
    ) as publisher:
        manifest = publisher.publish(0, tensors().items())
        assert not manifest.url.startswith("tcp://0.0.0.0")
        manifest = msgspec.structs.replace(manifest, url=f"tcp://127.0.0.1:{manifest.url.rpartition(':')[2]}")
        with open_there(manifest, hosts) as version:
            np.testing.assert_array_equal(version["t7"], tensors()["t7"])
        stranger = load_keys(hosts / "other")
        mixed = type(stranger)(
            server_public=load_keys(hosts / "run").server_public,
            client_public=stranger.client_public,
            client_secret=stranger.client_secret,
            server_secret=None,
        )
        for keys in (mixed, None):
            with pytest.raises(WeightsRefused, match="sent nothing"):
                tcp.pull(manifest, hosts / "stranger", timeout=0.3, keys=keys)


def test_nonsense_is_ignored(publisher, hosts):
    manifest = publisher.publish(0, tensors(0, 1).items())
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(manifest.url)
        for parts in ([b""], [b"x", b"y"], [b"../../etc/passwd", tcp._REQUEST.pack(0, 10)], [b"a", b"b", b"c"]):
            sock.send_multipart(parts)
        name = store.file_name(0, manifest.tensors).encode()
        sock.send_multipart([name, tcp._REQUEST.pack(2**63, 2**31)])
        for _ in range(2):  # the well-formed ones: there is no such file, and no such range
            assert sock.poll(5000) and sock.recv_multipart()[1] == b""
    open_there(manifest, hosts).close()


def test_the_last_worker_of_a_host_removes_its_copies(publisher, hosts):
    manifest = publisher.publish(0, tensors().items())
    (hosts / "manifest").write_bytes(msgspec.msgpack.encode(manifest))
    script = f"""
import msgspec, sys
from pathlib import Path
from areal_jax.transport.messages import Manifest
from areal_jax.weights import open_version
manifest = msgspec.msgpack.decode(Path({str(hosts / "manifest")!r}).read_bytes(), type=Manifest)
open_version(manifest, workdir={str(hosts / "run")!r}, host="there", shared_memory=Path({str(hosts / "there")!r}))
print("open", flush=True)
sys.stdin.read()
"""
    run = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([sys.executable, "-c", script], **run) for _ in range(2)]
    for worker in workers:
        assert worker.stdout.readline() == "open\n"
    folder = store.run_folder(hosts / "run", hosts / "there")
    workers[0].communicate(timeout=20)
    assert folder.exists()
    workers[1].communicate(timeout=20)
    assert not folder.exists()


def test_copies_of_workers_that_were_all_killed_go_with_the_next_pull_on_that_host(publisher, hosts):
    used = store.run_folder(hosts / "a run that lives", hosts / "there")
    copies._use(used)
    left = store.run_folder(hosts / "another run", hosts / "there")
    script = f"""
import os
from pathlib import Path
from areal_jax.weights import copies
copies._use(Path({str(left)!r}))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert left.exists()
    open_there(publisher.publish(0, tensors(0, 1).items()), hosts).close()
    assert not left.exists() and used.exists()


def test_a_folder_that_is_swept_while_it_is_made_is_made_again(hosts, monkeypatch):
    make_private, folder, made = store.make_private, store.run_folder(hosts / "run", hosts / "there"), []

    def swept(folder):
        made.append(make_private(folder))
        if len(made) == 1:
            folder.rmdir()
        return folder

    monkeypatch.setattr(store, "make_private", swept)
    copies._use(folder)
    assert len(made) == 2 and (folder / store.USERS).exists()


def test_waiting_for_another_puller_is_bounded(publisher, hosts):
    manifest = publisher.publish(0, tensors().items())
    folder = store.make_private(store.run_folder(hosts / "run", hosts / "there"))
    with open(folder / "pulling", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WeightsRefused, match="another process of this host"):
            open_there(manifest, hosts, timeout=0.2)
