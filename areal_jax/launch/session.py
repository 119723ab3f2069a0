"""One run from the launcher's side: its folder, its processes, what is shown meanwhile and what is said at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from areal_jax import config as configs
from areal_jax import disk
from areal_jax.config import ConfigError
from areal_jax.launch import summary
from areal_jax.launch.guardian import ENDING, RUNNING, TIDY_SECONDS
from areal_jax.launch.installed import check_installed
from areal_jax.launch.logs import diagnosis, log_tail
from areal_jax.launch.nodes import Share, share_of
from areal_jax.launch.roles import roles_of
from areal_jax.launch.supervisor import Outcome, Supervisor
from areal_jax.launch.view import make_view
from areal_jax.transport.endpoints import forget_endpoints, make_keys

# What may differ between the first start of a run and the next: how it is shown and supervised, where it listens, how
# long it goes on, and on which and how many devices. Everything else would make it another run.
_MAY_CHANGE = ("metrics", "launch", "name")
_KEYS_MAY_CHANGE = {
    "trainer": {
        "steps", "checkpoint_every", "keep_checkpoints", "batch_timeout", "eval_every", "processes",
        "data_parallel", "fsdp", "tensor", "expert", "rows", "remat", "layers", "max_segments",
        "weights_transport",
    },
    "rollout": {
        "workers", "python", "weights_timeout", "slots", "steps_per_dispatch", "rolling_updates", "engine_args",
    },
    "rewards": {"services", "processes", "address", "timeout"},
    "controller": {
        "address", "heartbeat_limit", "heartbeat_seconds", "progress_limit", "disk_limit", "max_attempts",
    },
}  # fmt: skip
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def prepare(config: Mapping[str, Any], workdir: str | os.PathLike) -> None:
    """Make the run's folder: config.json, keys, no endpoints of an earlier start.

    `config` is resolved. Raises `ConfigError` if the folder holds another run, a finished one, or one that is running.
    """
    workdir = Path(workdir)
    if (workdir / "config.json").exists():
        _check_same_run(configs.load(workdir), config, workdir)
        if (workdir / "summary.json").exists() and _steps_done(workdir) >= config["trainer"]["steps"]:
            raise ConfigError(f"the run in {workdir} is finished; use another --workdir, or raise trainer.steps")
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} holds something that is not a run (no config.json); use another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock(workdir, config["launch"]["stop_grace"] + TIDY_SECONDS):
            _forget_processes(workdir)
            configs.save(config, workdir)
            make_keys(workdir)
            disk.reserve(workdir)
            (workdir / "summary.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {workdir} cannot be used: {error.strerror}") from None


def run(config: Mapping[str, Any], workdir: str | os.PathLike, share: Share | None = None) -> int:
    """Start all roles of the prepared run in `workdir`, or `share` of them, and stay until its end; returns the exit
    code."""
    workdir = Path(workdir)
    try:
        grace = config["launch"]["stop_grace"]
        with _lock(workdir, grace + TIDY_SECONDS) as lock:
            roles, leaders = roles_of(config, workdir, share)
            started = time.time()
            view = make_view(config, workdir)
            limit = config["launch"]["announce_limit"]
            supervisor = Supervisor(
                roles, leaders, workdir, grace=grace, announce_limit=limit, tell=view.tell, lock=lock,
                guardian_restarts=config["launch"]["restarts"],
            )  # fmt: skip
            with view:
                outcome = supervisor.run(view.tick)
            _forget_processes(workdir)
            if outcome.status == "finished":  # and no controller will take over, whatever became of the last one
                shutil.rmtree(workdir / "controller", ignore_errors=True)
                disk.release(workdir)
            return report(outcome, workdir, started, supervisor.restarts)
    except ConfigError as error:
        print(f"areal_jax: error: {error}", file=sys.stderr)
        return 2


def run_node(workdir: str | os.PathLike, node: int, nodes: int) -> int:
    """Start node `node`'s roles of the run prepared in `workdir`, and stay until their end; returns the exit code.

    The first node is the run's launcher: it holds the folder, shows how the run goes, and says how it ended. Raises
    `ConfigError`.
    """
    config = configs.load(workdir)
    share = share_of(config, node, nodes)
    check_installed(config)
    if node == 0:
        return run(config, workdir, share)
    roles, leaders = roles_of(config, workdir, share)
    tell = functools.partial(print, f"areal_jax: node {node} ({socket.gethostname()}):", file=sys.stderr, flush=True)
    launch = config["launch"]
    supervisor = Supervisor(
        roles, leaders, workdir, grace=launch["stop_grace"], guardian_restarts=launch["restarts"], tell=tell,
        announce_limit=launch["announce_limit"], record=f"restarts-node{node}.jsonl",
    )  # fmt: skip
    outcome = supervisor.run()
    log = f"see {Path(workdir) / 'logs' / outcome.role}.log" if outcome.role else ""
    tell("; ".join(filter(None, (outcome.status, outcome.reason, log))))
    return outcome.exit_code


def report(outcome: Outcome, workdir: Path, started: float, restarts: int) -> int:
    """Say how the run ended: the summary, or the end of the failing role's log. Returns the exit code."""
    if outcome.status == "finished":
        try:
            with open(workdir / "summary.json", encoding="utf-8") as file:
                values = json.load(file)
        except (OSError, json.JSONDecodeError) as error:
            print(f"areal_jax: the run ended, but {workdir}/summary.json cannot be read: {error}", file=sys.stderr)
            return 1
        summary.show(values, workdir, time.time() - started, restarts)
        return 0
    if outcome.status == "stopped":
        print(f"areal_jax: {outcome.reason}; everything has ended. The same command again goes on from the checkpoint.")
        return outcome.exit_code
    log = workdir / "logs" / f"{outcome.role}.log"
    tail = log_tail(log)
    print(f"\n--- the end of {log} ---", file=sys.stderr)
    print("\n".join(tail), file=sys.stderr)
    print(f"---\nareal_jax: the run failed: {outcome.reason}: {diagnosis(tail)}", file=sys.stderr)
    return outcome.exit_code


def _check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    for key in new:
        if key in _MAY_CHANGE or old[key] == new[key]:
            continue
        if not isinstance(new[key], dict):
            raise _another_run(workdir, key, old[key], new[key])
        for name in new[key]:
            if old[key][name] != new[key][name] and name not in _KEYS_MAY_CHANGE.get(key, ()):
                raise _another_run(workdir, f"{key}.{name}", old[key][name], new[key][name])


def _another_run(workdir: Path, key: str, old: Any, new: Any) -> ConfigError:
    return ConfigError(
        f"{workdir} holds a run with {key}={old!r}, not {new!r}: use another --workdir, or the same settings to go on"
    )


def _steps_done(workdir: Path) -> int:
    try:
        return int(json.loads((workdir / "summary.json").read_text()).get("steps", 0))
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def _lock(workdir: Path, patience: float) -> Iterator[int]:
    """Hold the run's folder by a file whose descriptor is given; raises `ConfigError` if another launcher holds it.

    Waits at most `patience` seconds for a guardian, which ends what a killed launcher has left.
    """
    descriptor = os.open(workdir / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)  # not emptied: it may be another's
    with open(descriptor, "r+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + patience, False
        while not take_lock(file):
            file.seek(0)
            if file.read() != ENDING:
                raise ConfigError(f"the run in {workdir} is running already (its launcher holds launch.lock)")
            if time.monotonic() > deadline:
                raise ConfigError(f"what a killed launcher has left of the run in {workdir} is still ending")
            if not told:
                print(f"areal_jax: waiting for what a killed launcher has left of {workdir} to end", file=sys.stderr)
                told = True
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        file.write(RUNNING)  # as long as what follows: the guardian may have to write that on a full disk
        file.flush()
        yield file.fileno()


def take_lock(file: IO) -> bool:
    """Whether the run's folder is ours now, by its open `launch.lock`; another launcher or guardian may have it.

    A file system without locks (Lustre, unless mounted with flock) gives it to everybody: only this check is lost.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _forget_processes(workdir: Path) -> None:
    """A later start must not find the addresses of this one, nor who was silent in it."""
    forget_endpoints(workdir)
    shutil.rmtree(workdir / "silent", ignore_errors=True)
