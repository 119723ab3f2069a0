"""Hostile completions score 0, are named, and harm nothing; with and without bubblewrap."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile

import psutil
import pytest

from areal_jax.rewards import Score, VerifierPool, sandbox
from areal_jax.rewards.code import grade_code
from tests.rewards import hostile

TESTS = """
SECRET = 'EXPECTED'
def check(candidate):
    assert candidate(4) == 8
    assert abs(candidate(5) - 10) < 1e-6
"""
FAST = {"cpu_seconds": 1, "wall_seconds": 30.0, "memory_bytes": 512 << 20}
PROBLEMS = {kind: sandbox.works(kind) for kind in ("bwrap", "landlock")}  # a skipped test says which of them is why
ISOLATIONS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(problem), reason=f"isolation {kind}: {problem}"))
    for kind, problem in PROBLEMS.items()
]
ATTACKS = hostile.LIMITS | hostile.REACH | hostile.CHEAT
ALWAYS = (
    "endless loop", "fork bomb", "memory bomb", "huge output", "reads a file outside", "deletes a file outside",
    "connects over TCP", "signals its parent", "exits with status 0 on import", "ends the process when called",
    "returns what is equal to everything", "patches the comparison", "looks for the tests on the stack and in memory",
    "reads every descriptor it has",
)  # fmt: skip


def marked(attack: str):
    return pytest.param(attack, marks=() if attack in ALWAYS else pytest.mark.slow)


@pytest.fixture
def surroundings(tmp_path):
    """A file with a secret, a process, and a listening port, none of which may be touched."""
    secret = tmp_path / "secret"
    secret.write_text("EXPECTED: 8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield {"secret": str(secret), "outside": str(tmp_path), "port": server.getsockname()[1], "pid": bystander.pid}
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert secret.read_text() == "EXPECTED: 8" and os.stat(secret).st_mtime > 1e9
    assert sorted(os.listdir(tmp_path)) == ["secret"]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))


def children() -> list[str]:
    return [" ".join(child.cmdline())[:80] for child in psutil.Process().children(recursive=True)]


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("attack", [marked(attack) for attack in ATTACKS])
def test_attack(attack, isolation, surroundings):
    program, reasons = ATTACKS[attack]
    program = program.format(**surroundings)
    before, scratch = children(), sorted(os.listdir(tempfile.gettempdir()))
    options = FAST | {"isolation": isolation, "wall_seconds": 2.0 if reasons == "timeout" else FAST["wall_seconds"]}
    grade = grade_code(f"```python\n{program}\n```", TESTS, entry_point="double", **options)
    assert grade["reward"] == grade["accuracy"] == 0.0
    assert any(reason in grade["reason"] for reason in ([reasons] if isinstance(reasons, str) else reasons)), grade
    assert children() == before and sorted(os.listdir(tempfile.gettempdir())) == scratch


def test_no_program_can_make_its_verifier_fail():
    """Through the pool, as in a run: a failure would be dropped, and tried again, where a 0 is due."""
    working = [kind for kind, problem in PROBLEMS.items() if not problem]
    if not working:
        pytest.skip(str(PROBLEMS))

    async def main():
        async with VerifierPool(2, 60.0) as pool:
            calls = []
            for program, results in hostile.BREAK.values():
                tests = {"fn_name": "double", "inputs": [[4], [5]], "outputs": results}
                fields = FAST | {"completion": f"```python\n{program}\n```", "tests": tests, "isolation": working[0]}
                calls.append(pool.submit("areal_jax.rewards.grade_code", fields))
            return await asyncio.gather(*calls)

    for name, outcome in zip(hostile.BREAK, asyncio.run(main()), strict=True):
        assert isinstance(outcome, Score), (name, outcome)
        assert outcome.reward == 0.0 and outcome.reason, name


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_the_task_of_the_attacks_can_be_solved(isolation):
    program = "def double(n):\n    return 2 * n"
    assert grade_code(program, TESTS, entry_point="double", isolation=isolation, **FAST)["reward"] == 1.0


def test_there_is_a_sandbox_where_bubblewrap_is_not(monkeypatch):
    if PROBLEMS["landlock"]:
        pytest.skip(PROBLEMS["landlock"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox.works.cache_clear()
    try:
        assert sandbox.choose("auto") == "landlock"
    finally:
        sandbox.works.cache_clear()
