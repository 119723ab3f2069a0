"""The supervisor with small programs in place of the roles: deaths, restarts, signals, and nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from areal_jax.launch import supervisor as supervisor_module
from areal_jax.launch.logs import diagnosis
from areal_jax.launch.supervisor import Outcome, Role, Supervisor, describe_exit
from areal_jax.transport.silence import Silence, report_silence
from areal_jax.weights import store

FOREVER = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
CRASH = "raise ValueError('the shape is wrong')"
# Counts its lives in a file, and ends well in the third one.
THIRD_TIME = "import sys; f = open(sys.argv[1], 'a+'); f.write('x'); f.seek(0); sys.exit(len(f.read()) < 3)"
UNTIL_HELLO = """
import os, sys, time
while not os.path.exists(sys.argv[1] + "/logs/rewards-0.log") or not open(sys.argv[1] + "/logs/rewards-0.log").read():
    time.sleep(0.01)
"""
ROOT = Path(__file__).parents[2]


def role(name, program, *arguments, **options):
    command = (sys.executable, "-c", program, *map(str, arguments))
    return Role(name=name, command=command, env=dict(os.environ), **options)


def run(tmp_path, *roles, leaders=("trainer",), tick=lambda supervisor: None, grace=5.0):
    told = []
    before = psutil.Process().children(recursive=True)  # of other tests in this process
    supervisor = Supervisor(roles, leaders, tmp_path, grace=grace, tell=told.append)
    outcome = supervisor.run(lambda: tick(supervisor), interval=0.01)
    assert not set(psutil.Process().children(recursive=True)) - set(before)
    return outcome, told, supervisor


def ends(pid):
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(timeout=30)
    except psutil.NoSuchProcess:
        pass
    return True


def test_the_run_ends_with_the_trainer_and_everyone_goes(tmp_path):
    outcome, told, _ = run(tmp_path, role("trainer", UNTIL_HELLO, tmp_path), role("rewards-0", "print('hello')"))
    assert told == []  # that the other one left first is no death
    assert outcome == Outcome("finished") and outcome.exit_code == 0
    assert (tmp_path / "logs" / "rewards-0.log").read_text() == "hello\n"


def test_niceness_acts_between_roles(tmp_path):
    """Linux may weigh sessions against each other first, and niceness only inside of one; so all roles are in one."""
    say = "import os; print(os.nice(0), os.getsid(0), flush=True)\n"
    plain = role("rewards-0", say)
    nicer = role("rollout-0", say + UNTIL_HELLO, tmp_path, nice=5)
    run(tmp_path, role("trainer", UNTIL_HELLO.replace("rewards-0", "rollout-0"), tmp_path), plain, nicer)
    (nice, session), (more, same) = (
        map(int, (tmp_path / "logs" / f"{name}.log").read_text().split()) for name in ("rewards-0", "rollout-0")
    )
    assert more == nice + 5 and session == same == os.getsid(0)


def test_a_worker_that_dies_is_started_again_and_its_log_goes_on(tmp_path):
    lives = tmp_path / "lives"
    lives.touch()
    wait = "import os, sys, time\nwhile os.path.getsize(sys.argv[1]) < 3: time.sleep(0.01)"
    worker = role("rollout-0", THIRD_TIME, lives, restarts=5, peers="rollout")
    outcome, told, supervisor = run(tmp_path, role("trainer", wait, lives), worker)
    assert outcome.status == "finished"
    assert lives.read_text() == "xxx" and supervisor.restarts == 2
    assert told[0] == "rollout-0 ended with exit code 1; starting it again (1 of 5)"


def test_a_worker_that_dies_too_often_ends_the_run_with_its_name(tmp_path):
    outcome, told, _ = run(tmp_path, role("trainer", FOREVER), role("rollout-0", CRASH, restarts=2, peers="rollout"))
    assert outcome == Outcome("failed", "rollout-0 ended with exit code 1, 3 times in a row", "rollout-0")
    assert outcome.exit_code == 1 and len(told) == 2
    log = (tmp_path / "logs" / "rollout-0.log").read_text().splitlines()
    assert diagnosis(log) == "ValueError: the shape is wrong"


@pytest.mark.parametrize("code", [2, 70])
def test_a_role_that_says_that_the_run_cannot_go_on_is_believed(tmp_path, code):
    final = role("rewards-0", f"import sys; sys.exit({code})", restarts=5, peers="rewards")
    other = role("rewards-1", FOREVER, peers="rewards")
    outcome, told, supervisor = run(tmp_path, role("trainer", FOREVER), final, other)
    assert outcome == Outcome("failed", f"rewards-0 ended with exit code {code}", "rewards-0")
    assert not told and not supervisor.restarts


def test_one_of_several_workers_may_be_given_up(tmp_path):
    told, done = [], tmp_path / "done"

    def tick(supervisor):
        if any("given up" in line for line in told):
            done.touch()

    trainer = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"
    roles = [role("rollout-0", CRASH, restarts=1, peers="rollout"), role("rollout-1", FOREVER, peers="rollout")]
    supervisor = Supervisor(
        [role("trainer", trainer, done), *roles], ["trainer"], tmp_path, grace=5, farewell=0.0, tell=told.append
    )
    outcome = supervisor.run(lambda: tick(supervisor), interval=0.01)
    assert outcome.status == "finished"
    assert told[-1] == "rollout-0 ended with exit code 1 2 times in a row and is given up; others go on: 1"


def test_a_signal_ends_the_trainer_first_and_a_role_that_ignores_it_is_killed(tmp_path):
    order = tmp_path / "order"
    # While each ends, a scheduler tells the launcher once more: that cuts nothing short.
    again = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.2)"
    end = f"{again}; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(0)"
    note = f"import os, signal, sys, time\ndef end(*_):\n  {end}\n"
    polite = note + "signal.signal(signal.SIGTERM, end); print('up', flush=True); signal.pause()"
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    logs = tmp_path / "logs"
    names = ("trainer", "controller", "rollout-0")

    def tick(_):
        if all((logs / f"{n}.log").read_text() for n in names):
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, told, _ = run(
        tmp_path, role("controller", polite, order, "c"), role("trainer", polite, order, "t"),
        role("rollout-0", stubborn), tick=tick, grace=0.5,
    )  # fmt: skip
    assert outcome.status == "stopped" and outcome.exit_code == 130
    assert order.read_text() == "tc"
    assert any(line.startswith("rollout-0 did not end") for line in told)


@pytest.mark.parametrize(("code", "status"), [(75, "stopped"), (2, "failed"), (70, "failed"), (0, "finished")])
def test_exit_codes_that_restarts_cannot_change(tmp_path, code, status):
    outcome, told, supervisor = run(tmp_path, role("trainer", f"raise SystemExit({code})", restarts=5))
    assert outcome.status == status and supervisor.restarts == 0 and not told


def test_without_the_controller_the_trainer_cannot_save_and_is_not_waited_for_before_the_others(tmp_path):
    mark, ready = tmp_path / "told", tmp_path / "ready"
    tells = "import pathlib, signal, sys\ndef end(*_): pathlib.Path(sys.argv[1]).touch(); sys.exit(0)\n"
    worker = f"{tells}signal.signal(signal.SIGTERM, end)\npathlib.Path(sys.argv[2]).touch()\nsignal.pause()"
    waits = "import os, sys, time, signal\n{}while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n{}"
    trainer = waits.format("signal.signal(signal.SIGTERM, lambda *_: None)\n", "")  # until the worker is told to end
    controller = waits.format("", "sys.exit(70)")
    roles = (
        role("trainer", trainer, mark),
        role("rollout-0", worker, mark, ready),
        role("controller", controller, ready),
    )
    outcome, told, _ = run(tmp_path, *roles)
    assert outcome.role == "controller" and told == []


def test_grandchildren_go_with_their_role(tmp_path):
    pids = tmp_path / "pid"
    program = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"
        "open(sys.argv[1], 'w').write(str(p.pid))"
    )
    outcome, _, _ = run(tmp_path, role("trainer", program, pids))
    assert outcome.status == "finished" and ends(int(pids.read_text()))


def test_nothing_is_left_when_the_supervisor_itself_is_killed(tmp_path):
    launcher = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from areal_jax.launch.supervisor import Role, Supervisor
        stubborn = ("import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
                    "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']); signal.pause()")
        polite = {FOREVER!r}
        programs = {{"trainer": polite, "x": stubborn}}
        roles = [Role(name=n, command=(sys.executable, "-c", p), env=dict(os.environ)) for n, p in programs.items()]
        s = Supervisor(roles, ["trainer"], {str(tmp_path)!r}, grace=0.3)
        s.start()
        print("up", flush=True)
        import signal; signal.pause()
    """)
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    me = psutil.Process(process.pid)
    while len(children := me.children(recursive=True)) < 4:  # guardian, trainer, x and its child
        assert process.poll() is None
    weights = store.make_private(store.run_folder(tmp_path))
    (weights / "a version").touch()
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, left
    assert not weights.exists()


def test_a_guardian_that_is_killed_costs_nothing_and_is_replaced(tmp_path):
    """The next one knows what runs, and ends it when the supervisor is gone."""
    told = []
    roles = [role("trainer", FOREVER), role("rollout-0", CRASH, restarts=1)]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, tell=told.append)
    supervisor.start()
    trainer, worker = (supervisor._processes[each.name] for each in roles)
    supervisor._guardian.kill()
    supervisor._guardian.wait()
    assert worker.popen.wait() == 1
    supervisor._after_death(worker, 1)  # before anybody has noticed
    assert supervisor.restarts == 1 and worker.popen.wait() == 1
    assert supervisor._look().role == "rollout-0"
    assert told[1] == "the guardian was killed by SIGKILL (out of memory? see the kernel's log); starting another"
    supervisor._guardian.stdin.close()  # as the supervisor's death does
    assert trainer.popen.wait(30) in (0, -signal.SIGTERM)
    supervisor._guardian.wait()


UNTIL = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)"


def test_a_guardian_that_cannot_start_is_tried_after_pauses_and_not_for_ever(tmp_path, monkeypatch):
    now, told = 0.0, []
    monkeypatch.setattr(supervisor_module, "own_env", lambda: os.environ | {"PYTHONHOME": str(tmp_path)})
    roles = [role("trainer", FOREVER)]
    supervisor = Supervisor(roles, ["trainer"], tmp_path, tell=told.append, clock=lambda: now, guardian_restarts=3)

    def started_at(later):
        """Whether another was started, when the one before has died and so many seconds have gone by."""
        nonlocal now
        if supervisor._guardian is not None:
            supervisor._guardian.wait()
        now += later
        assert supervisor._look() is None
        return supervisor._guardian is not None

    supervisor.start()
    try:
        assert started_at(0.0)
        assert not started_at(0.0) and not started_at(0.5) and started_at(0.5)
        assert not started_at(0.0) and not started_at(1.0) and started_at(1.0)
        assert not started_at(0.0) and not started_at(1e6), "given up"
        assert len(told) == 4 and "4 times in a row; going on without one" in told[-1]
    finally:
        supervisor._kill_all()


def test_a_guardian_that_was_replaced_is_on_record(tmp_path):
    def tick(supervisor):
        record = tmp_path / "restarts.jsonl"
        if not record.exists() or not record.stat().st_size:
            supervisor._guardian.kill()
            supervisor._guardian.wait()
        else:
            (tmp_path / "done").touch()

    outcome, _, supervisor = run(tmp_path, role("trainer", UNTIL, tmp_path / "done"), tick=tick)
    assert outcome.status == "finished" and supervisor.restarts == 0  # of roles
    (row,) = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert row["role"] == "guardian" and row["how"].startswith("was killed by SIGKILL")


def test_a_guardian_that_hangs_holds_up_the_end_for_so_long_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "TIDY_SECONDS", 0.2)

    def tick(supervisor):
        os.kill(supervisor._guardian.pid, signal.SIGSTOP)
        (tmp_path / "done").touch()

    outcome, told, _ = run(tmp_path, role("trainer", UNTIL, tmp_path / "done"), tick=tick, grace=0.1)
    assert outcome.status == "finished" and told == ["the guardian did not end within 0 s and is killed"]


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (-11, "was killed by SIGSEGV"), (-9, "was killed by SIGKILL (out of memory?")],
)
def test_exit_codes_in_words(code, words):
    assert describe_exit(code).startswith(words)


def test_the_diagnosis_is_the_last_error_of_the_log():
    log = ["Traceback (most recent call last):", '  File "x.py", line 1', "    raise: x", "zmq.error.ZMQError: taken"]
    assert diagnosis([*log, "bye"]) == "zmq.error.ZMQError: taken"
    assert diagnosis(["a", "b", ""]) == "b"
    assert diagnosis([]) == "its log is empty"
    assert diagnosis([f"XlaError: {'again: ' * 200}the peer is gone"]).endswith("again: the peer is gone")
    assert len(diagnosis(["x" * 9999])) < 450


# Stops itself in its first life, and a trainer that ends once there is a second one.
HANGS_ONCE = (
    "import os, signal, sys; f = open(sys.argv[1], 'a+'); f.write('x'); f.flush(); f.seek(0)\n"
    "if len(f.read()) == 1: os.kill(os.getpid(), signal.SIGSTOP)"
)
UNTIL_TWO = "import os, sys, time\nwhile os.path.getsize(sys.argv[1]) < 2: time.sleep(0.01)"


def test_a_worker_that_hangs_is_killed_and_replaced_when_the_controller_says_so(tmp_path):
    """Its first life stops itself; a report about another process of that name changes nothing."""
    lives = tmp_path / "lives"
    lives.touch()

    reports = []

    def tick(supervisor):
        if lives.stat().st_size == 1 and len(reports) < 2 and not (tmp_path / "silent" / "rollout-0").exists():
            pid = supervisor.pid("rollout-0") + (not reports)  # the first report is about somebody else
            reports.append(Silence(socket.gethostname(), pid, 61.0, "generating"))
            report_silence(tmp_path, "rollout-0", reports[-1])

    worker = role("rollout-0", HANGS_ONCE, lives, restarts=1, peers="rollout")
    outcome, told, supervisor = run(tmp_path, role("trainer", UNTIL_TWO, lives), worker, tick=tick)
    assert outcome.status == "finished" and supervisor.restarts == 1
    assert told[0] == "rollout-0 is killed: the controller has heard nothing from it for 61 s (it was generating)"


def test_a_controller_that_hangs_is_replaced_but_not_its_successor_for_the_same_silence(tmp_path):
    """Nobody else knows its process: whoever has lived for less than the silence is not to blame."""
    lives = tmp_path / "lives"
    lives.touch()
    reports = []

    def tick(_):
        if lives.stat().st_size == 1 and len(reports) < 2 and not (tmp_path / "silent" / "controller").exists():
            seconds = 0.0 if reports else 1e6
            reports.append(Silence("", 0, seconds, "asked for GetBatch", by="trainer-0"))
            report_silence(tmp_path, "controller", reports[-1])

    controller = role("controller", HANGS_ONCE, lives, restarts=1)
    outcome, told, supervisor = run(tmp_path, role("trainer", UNTIL_TWO, lives), controller, tick=tick)
    assert outcome.status == "finished" and supervisor.restarts == 1
    assert told[0] == "controller is killed: trainer-0 has heard nothing from it for 0 s (it was asked for GetBatch)"


def test_the_time_that_a_role_hung_does_not_count_as_life(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "STABLE_SECONDS", 0.0)

    def tick(supervisor):
        report_silence(tmp_path, "controller", Silence(socket.gethostname(), supervisor.pid("controller"), 1e6, "idle"))

    controller = role("controller", "import signal; signal.pause()", restarts=2)
    outcome, _, supervisor = run(tmp_path, role("trainer", FOREVER), controller, tick=tick)
    assert outcome.role == "controller" and "3 times in a row" in outcome.reason and supervisor.restarts == 2


def test_a_run_that_the_controller_has_ended_is_not_begun_again(tmp_path):
    controller = role("controller", "raise SystemExit('controller: the run cannot go on: nobody is there')", restarts=3)
    outcome, _, supervisor = run(tmp_path, role("trainer", FOREVER), controller)
    assert outcome.status == "failed" and supervisor.restarts == 3  # exit code 1: it may have been anything
    controller = role("controller", "raise SystemExit(70)", restarts=3)
    outcome, _, supervisor = run(tmp_path, role("trainer", FOREVER), controller)
    assert outcome.role == "controller" and supervisor.restarts == 0


def test_what_was_started_again_is_on_record(tmp_path):
    crash = role("rollout-0", "raise SystemExit(3)", restarts=2, peers="rollout")
    roles = [role("trainer", FOREVER), crash]
    Supervisor(roles, ["trainer"], tmp_path, grace=5, tell=lambda _: None).run(interval=0.01)
    rows = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [(row["role"], row["how"]) for row in rows] == [("rollout-0", "ended with exit code 3")] * 2
