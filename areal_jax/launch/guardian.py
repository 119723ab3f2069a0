"""A watcher that outlives the supervisor: when the supervisor is gone, however it went, nothing else stays behind.

The supervisor starts it with a pipe on its standard input and writes one line per process group: "+123" when one is
started, "-123" when it has ended. The end of the pipe means that the supervisor is dead. Then the groups that are left
are told to end (so that the trainer saves a checkpoint), and killed after the grace period. Last of all, it removes
weights that killed processes left on disk or pulled from another host, scratch folders of programs under test, and the
addresses of servers that are gone. Until then it imports next to nothing.

It inherits the launcher's lock of the run's folder, so that nobody starts the run again while it is at work, and writes
into it that the run is about to be over. On a cluster one node's launcher has the lock; elsewhere only what is on the
node itself is removed.
"""

import contextlib
import os
import signal
import sys
import time

RUNNING, ENDING = "running", "ending "  # what the lock's file says, and once the launcher is gone
PROCESSES = "/proc"  # of Linux; elsewhere a group is one thing
# Python's cleaner of named semaphores (multiprocessing's, which vLLM uses): it ends when all that it serves have ended,
# and takes with it what these could not remove themselves. Killed with them, it would leave that in /dev/shm.
CLEANER = b"multiprocessing.resource_tracker"
CLEANER_SECONDS = 5.0
TIDY_SECONDS = 30.0  # for all but the ends of others: to start, and to remove what they have left


def watch(lines, grace: float, lock: int | None = None) -> None:
    """Read `lines` to their end, then end every process group that was started and has not ended."""
    groups: list[int] = []
    for line in lines:
        sign, group = line[:1], int(line[1:])
        if sign == "+":
            groups.append(group)
        elif group in groups:
            groups.remove(group)
    if lock is not None:
        with contextlib.suppress(OSError):
            os.pwrite(lock, ENDING.encode(), 0)
    end_groups(groups, grace)


def end_groups(groups: list[int], grace: float) -> None:
    """SIGTERM to all `groups`, SIGKILL after `grace` seconds to what is left; each group's cleaner goes last."""
    if grace > 0:
        for group in groups:
            send(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while (groups := [group for group in groups if send(group, 0)]) and time.monotonic() < deadline:
            time.sleep(0.05)
    cleaned, deadline = groups, time.monotonic() + CLEANER_SECONDS
    while (cleaned := [group for group in cleaned if _spare_cleaner(group)]) and time.monotonic() < deadline:
        time.sleep(0.005)
    for group in groups:
        send(group, signal.SIGKILL)


def _spare_cleaner(group: int) -> bool:
    """Whether `group` has a cleaner; then all its other processes are killed, one by one."""
    found = members(group)
    others = [pid for pid in found if CLEANER not in _command(pid)]
    if len(others) == len(found):
        return False
    for pid in others:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return True


def members(group: int) -> list[int]:
    """The living processes of a process group; empty where processes cannot be listed."""
    found = []
    for name in os.listdir(PROCESSES) if os.path.isdir(PROCESSES) else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"{PROCESSES}/{name}/stat", "rb") as file:
                state, _, its_group = file.read().rpartition(b")")[2].split()[:3]
                if int(its_group) == group and state not in (b"Z", b"X"):
                    found.append(int(name))
    return found


def _command(pid: int) -> bytes:
    try:
        with open(f"{PROCESSES}/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def send(group: int, number: int) -> bool:
    """Signal a process group; False if nothing is left of it."""
    try:
        os.killpg(group, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        watch(sys.stdin, float(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
    from areal_jax.rewards.folders import sweep_folders
    from areal_jax.transport.endpoints import forget_endpoints
    from areal_jax.weights import cleanup

    alone = len(sys.argv) > 3  # else another node's launcher holds the run's folder, and the run may go on there
    cleanup(sys.argv[2], disk=alone)
    sweep_folders()
    if alone:
        forget_endpoints(sys.argv[2])
