"""The pool: a score or a named failure, never both; whoever overruns or dies is killed and replaced."""

import asyncio
import errno
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
import types

import msgspec
import numpy as np
import psutil
import pytest

from areal_jax.rewards import Failure, Score, VerifierError, VerifierPool, folders, process, sandbox
from areal_jax.rewards.loading import load_verifier

HERE = "tests.rewards.verifiers"
RECORD = {"prompt": "1+1", "completion": "2", "answer": "2", "prompt_tokens": [1], "completion_tokens": [7, 8, 9]}


def run(*calls, processes=1, timeout=20.0, **options):
    """The outcomes of (function name, extra fields) calls, submitted together; and the pool's counts."""

    async def main():
        async with VerifierPool(processes, timeout, memory_bytes=0, **options) as pool:
            outcomes = await asyncio.gather(*(pool.submit(f"{HERE}.{name}", RECORD | fields) for name, fields in calls))
        return outcomes, dict(pool.counts)

    return asyncio.run(main())


def alive(pid: int) -> bool:
    """Whether a process that was killed is still there a while later; it takes a busy machine some time to end one."""
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(timeout=10)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_sync_and_async_verifiers_get_the_fields_they_name():
    calls = [("agree", {}), ("agree", {"answer": "3"}), ("agree_later", {}), ("everything", {"level": 3})]
    outcomes, counts = run(*calls, ("token_count", {}))
    assert [o.reward for o in outcomes] == [1.0, 0.0, 5.0, 1.0, 3.0]
    assert outcomes[2].accuracy == 1.0 and outcomes[2].values == {"length": 1.0}
    assert outcomes[3].values == {"fields": 7.0, "prompt_given": 1.0}
    assert counts["scored"] == 5 and counts["started"] == 1


def test_numpy_fields_arrive_as_lists():
    (outcome,), _ = run(("token_count", {"completion_tokens": np.arange(4, dtype=np.int32), "level": np.float32(1.0)}))
    assert outcome.reward == 4.0


@pytest.mark.parametrize(
    ("name", "fields", "kind", "text"),
    [
        ("raises", {}, "exception", "RuntimeError: cannot judge 2"),
        ("exits", {}, "exception", "SystemExit"),
        ("dies", {}, "crash", "exit status 3; it wrote: last words"),
        ("give_back", {}, "exception", r"needs ['value']"),
        ("give_back", {"value": "nan"}, "bad_return", "finite"),
        ("give_back", {"value": "none"}, "bad_return", "None"),
        ("give_back", {"value": "text"}, "bad_return", "'1.0'"),
        ("give_back", {"value": "no_reward"}, "bad_return", "'reward'"),
        ("agree", {"answer": object()}, "exception", "cannot be sent"),
        ("missing", {}, "exception", "does not import"),
    ],
)
def test_what_goes_wrong_is_a_failure_with_a_name_and_the_next_call_is_served(name, fields, kind, text):
    (failed, after), counts = run((name, fields), ("agree", {}))
    assert isinstance(failed, Failure) and failed.kind == kind and text in failed.text
    assert isinstance(after, Score) and after.reward == 1.0
    assert counts[kind] == 1 and counts["scored"] == 1


def test_a_bool_is_a_score():
    assert run(("give_back", {"value": "bool"}))[0][0].reward == 1.0


def test_an_overrunning_verifier_is_killed_with_its_children_and_replaced(tmp_path):
    pid_file = tmp_path / "pids"
    (late, after), counts = run(("loops", {"pid_file": str(pid_file)}), ("agree", {}), timeout=1.5)
    assert late.kind == "timeout" and "1.5 s" in late.text
    assert after.reward == 1.0 and counts["started"] == 2
    assert not any(alive(int(pid)) for pid in pid_file.read_text().split())


def test_a_verifier_process_that_cannot_be_ended_is_named_and_not_waited_for(monkeypatch, caplog):
    """One that the kernel holds at a disk, say; played by a SIGKILL that does nothing."""
    worker = process.WorkerProcess()
    monkeypatch.setattr(process, "REAP_SECONDS", 0.1)
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    worker.call(f"{HERE}.agree", RECORD, timeout=20.0)  # imports
    assert worker.call(f"{HERE}.naps", {"seconds": 999}, timeout=0.1).kind == "timeout"
    assert f"a verifier process (process {worker.pid}) has not ended 0.1 s after SIGKILL" in caplog.text
    worker._process.kill()
    worker._process.wait(10)


def test_a_loop_inside_one_c_call_is_interrupted():
    (late, after), _ = run(("c_loop", {}), ("agree", {}), timeout=1.0)
    assert late.kind == "timeout" and after.reward == 1.0


def test_every_call_of_a_verifier_has_the_time_limit_not_only_the_first():
    """Only the first has an import to wait for, which has a limit of its own."""
    (first, late, after), _ = run(("naps", {}), ("naps", {"seconds": 1000}), ("naps", {}), timeout=1.0)
    assert first.reward == after.reward == 1.0
    assert late.kind == "timeout" and "1 s" in late.text


def test_one_stuck_verifier_does_not_hold_up_the_others():
    outcomes, _ = run(("loops", {}), *[("agree", {})] * 20, processes=2, timeout=2.0)
    assert outcomes[0].kind == "timeout"
    assert all(o.reward == 1.0 for o in outcomes[1:])


def test_an_outcome_does_not_wait_for_a_call_behind_it():
    """Outcomes are told together where that costs nobody time; a call that takes long is not waited for."""

    async def main():
        async with VerifierPool(1, 60.0, memory_bytes=0) as pool:
            first, stuck = (asyncio.create_task(pool.submit(f"{HERE}.{name}", RECORD)) for name in ("agree", "loops"))
            done, _ = await asyncio.wait([first, stuck], return_when=asyncio.FIRST_COMPLETED)
            await pool.close()
            return done == {first}, (await first).reward, (await stuck).kind

    assert asyncio.run(main()) == (True, 1.0, "crash")


def test_what_a_verifier_prints_does_not_reach_the_protocol():
    outcomes, _ = run(("prints", {}), ("prints", {}))
    assert [o.reward for o in outcomes] == [1.0, 1.0]


def test_workers_import_neither_jax_nor_torch():
    (outcome,), _ = run(("modules", {}))
    assert outcome.values == {"jax": 0.0, "torch": 0.0, "sympy": 1.0}


def test_a_worker_that_died_idle_costs_nobody_a_call():
    async def main():
        async with VerifierPool(1, 20.0, memory_bytes=0) as pool:
            first = await pool.submit(f"{HERE}.pid", {})
            os.kill(int(first.reward), 9)
            psutil.Process(int(first.reward)).wait(10)
            second = await pool.submit(f"{HERE}.pid", {})
        return first, second

    first, second = asyncio.run(main())
    assert isinstance(second, Score) and second.reward != first.reward


def test_workers_are_recycled():
    outcomes, _ = run(*[("pid", {})] * 4, recycle_after=2)
    assert len({o.reward for o in outcomes}) == 2


def test_close_ends_calls_in_flight_and_leaves_no_process(tmp_path):
    pid_file = tmp_path / "pids"

    async def main():
        pool = VerifierPool(1, 60.0, memory_bytes=0)
        await pool.start()
        call = asyncio.create_task(pool.submit(f"{HERE}.loops", {"pid_file": str(pid_file)}))
        while not (pid_file.exists() and len(pid_file.read_text().split()) == 2):
            await asyncio.sleep(0.01)
        await pool.close()
        outcome = await call
        with pytest.raises(VerifierError, match="closed"):
            await pool.submit(f"{HERE}.pid", {})
        return outcome

    assert asyncio.run(main()).kind == "crash"
    assert not any(alive(int(pid)) for pid in pid_file.read_text().split())


def test_workers_die_with_a_parent_that_is_killed(tmp_path):
    pid_file = tmp_path / "pids"
    script = f"""
        import asyncio
        from areal_jax.rewards import VerifierPool
        async def main():
            pool = VerifierPool(1, 60.0)
            await pool.submit("{HERE}.loops", {{"pid_file": "{pid_file}"}})
        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    while not (pid_file.exists() and len(pid_file.read_text().split()) == 2):
        assert parent.poll() is None
    worker, child = map(psutil.Process, map(int, pid_file.read_text().split()))
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([worker], 10)
    child.kill()  # whom a verifier starts outlives a killed service, unless it asks not to, as the sandbox does
    assert gone


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("verify", "expected package.module.function"),
        ("no.such.module.verify", "No module named 'no'"),
        (f"{HERE}.nothing", "nothing"),
        (f"{HERE}.HERE", "does not import"),
        ("areal_jax.rewards.outcome.FAILURE_KINDS", "not a function"),
    ],
)
def test_a_path_that_does_not_import_is_one_line(path, text):
    with pytest.raises(VerifierError, match="reward function") as error:
        load_verifier(path)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_both_spellings_of_a_path():
    assert load_verifier(f"{HERE}.agree") is load_verifier(f"{HERE}:agree")


def test_outcomes_travel_as_msgpack():
    score = Score(reward=1.0, accuracy=0.5, values={"a": 2.0}, reason="x")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(score), type=Score) == score


def test_the_package_imports_without_jax():
    code = "import sys, areal_jax.rewards; sys.exit(any(m in sys.modules for m in ('jax', 'torch', 'sympy', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_finds_no_room_for_its_marker_leaves_nothing(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(folders.Path, "touch", no_room)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No space left"):
        folders.make_folder()
    assert not list(tmp_path.iterdir()) and os.listdir("/proc/self/fd") == before


def test_folders_of_a_killed_service_are_swept_and_those_in_use_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, descriptor = folders.make_folder()
    others = [tmp_path / name for name in ("verifier-results", f"{os.path.basename(folder)}-results")]
    for other in others:
        other.mkdir()
        (other / "result").write_text("a user's")
    folders.sweep_folders()
    assert os.path.isdir(folder)
    (tmp_path / os.path.basename(folder) / "scratch").write_text("x")
    os.close(descriptor)  # as when its holder is killed
    folders.sweep_folders()
    assert not os.path.exists(folder) and all((other / "result").is_file() for other in others)


@pytest.fixture
def nobody():
    """A user whom the modes of folders bind, as they do not bind root."""
    root = not os.geteuid()
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_a_folder_that_hides_what_it_holds_is_over_the_limit_and_is_removed(nobody):
    folder = tempfile.mkdtemp(dir="/tmp")
    run = types.SimpleNamespace(scratch=folder, limits=sandbox.Limits())
    assert not sandbox.Child.over_disk(run)
    os.mkdir(f"{folder}/hidden", 0o300)  # to be filled, and not to be listed
    with open(f"{folder}/hidden/file", "w"):
        assert sandbox.Child.over_disk(run)
    folders.remove_folder(folder)
    assert not os.path.exists(folder)


def test_a_folder_is_removed_that_is_deeper_than_there_are_descriptors(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (at + 100, hard))
        folders.remove_folder(str(tmp_path / "d"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not list(tmp_path.iterdir())
