"""A watcher that outlives the supervisor: when the supervisor is gone, however it went, nothing else stays behind.

The supervisor starts it with a pipe on its standard input and writes one line per process group: "+123" when one is
started, "-123" when it has ended. The end of the pipe means that the supervisor is dead. Then the groups that are left
are told to end (so that the trainer saves a checkpoint), and killed after the grace period. Last of all, it removes
weights that killed processes left on disk or pulled from another host, and the addresses of servers that are gone.
Until then it imports next to nothing.

It inherits the launcher's lock of the run's folder, so that nobody starts the run again while it is at work, and writes
into it that the run is about to be over.
"""

import contextlib
import os
import signal
import sys
import time

ENDING = "ending"  # what the lock's file says once the launcher is gone


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
        os.truncate(lock, 0)
        os.pwrite(lock, ENDING.encode(), 0)
    end_groups(groups, grace)


def end_groups(groups: list[int], grace: float) -> None:
    """SIGTERM to all `groups`, SIGKILL after `grace` seconds to what is left of them."""
    for group in groups:
        send(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while (groups := [group for group in groups if send(group, 0)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in groups:
        send(group, signal.SIGKILL)


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
    from areal_jax.transport.endpoints import forget_endpoints
    from areal_jax.weights import cleanup

    cleanup(sys.argv[2])
    forget_endpoints(sys.argv[2])
