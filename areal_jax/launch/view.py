"""The live view of a run: a full screen on a terminal, one line per training step elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from areal_jax.launch.snapshot import NAMES, Snapshot, snapshot, sparkline
from areal_jax.metrics.writers import MetricsReader

QUIET_SECONDS = 15.0  # the line view says what is going on at least so often


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line (to standard output without `file`). On a full disk the line is lost, not the run."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def make_view(config: Mapping[str, Any], workdir: str | os.PathLike) -> NoView:
    """The view that `config.metrics.view` names; "auto" is the full screen where there is a terminal."""
    kind = config["metrics"]["view"]
    if kind == "auto":
        kind = "full" if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" else "lines"
    return {"full": FullView, "lines": LineView, "none": NoView}[kind](config, workdir)


class NoView:
    """Says only what must be said (restarts, failures), on standard error. Use as a context manager."""

    def __init__(self, config: Mapping[str, Any], workdir: str | os.PathLike):
        self._config, self._workdir = config, workdir

    def __enter__(self) -> NoView:
        return self

    def __exit__(self, *_) -> None:
        pass

    def tell(self, text: str) -> None:
        """One event."""
        say(f"areal_jax: {text}", sys.stderr)

    def tick(self) -> None:
        """Called a few times per second."""


class LineView(NoView):
    """One line per training step, and a word now and then while there is none."""

    def __init__(self, config: Mapping[str, Any], workdir: str | os.PathLike):
        super().__init__(config, workdir)
        self._status = StatusPoller(workdir, config["metrics"]["refresh_seconds"])
        self._started = self._spoken = time.monotonic()
        self._metrics, self._disk = MetricsReader(workdir, NAMES), ""
        self._metrics.read()
        self._shown = {line for row in self._metrics.rows for line in _kinds(row)}  # by an earlier start

    def __enter__(self) -> LineView:
        self._status.start()
        say(f"areal_jax: {self._config['name']} in {self._workdir}; logs in {self._workdir}/logs")
        return self

    def __exit__(self, *_) -> None:
        self.tick()
        self._status.stop()

    def tick(self) -> None:
        now, changed = time.monotonic(), self._metrics.read()
        rows = self._metrics.rows if changed else []
        for count, row in enumerate(rows, 1):
            if row["step"] in changed:
                self._show(rows[:count], now)
        if (disk := self._status.data.get("disk", "")) != self._disk:
            self._disk = disk
            self._say(f"warning: {disk}; trying again" if disk else "the disk takes writes again", now)
        if now - self._spoken >= QUIET_SECONDS:
            self._say(activity(snapshot(self._metrics.rows, self._status.data, self._config)), now)

    def _show(self, rows: list[dict[str, Any]], now: float) -> None:
        """What the last of `rows` has to say that was not said yet."""
        row = rows[-1]
        for kind in _kinds(row):
            if kind in self._shown:
                continue
            self._shown.add(kind)
            if kind[0] == "held-out":
                text = f"held-out accuracy {row['eval/accuracy']:.1%} with version {row['step']}"
            else:
                text = step_line(snapshot(rows, self._status.data, self._config))
                if row.get("warning"):
                    text += f"\n          warning: {row['warning']}"
            self._say(text, now)

    def _say(self, text: str, now: float) -> None:
        say(f"{now - self._started:6.0f} s  {text}")
        self._spoken = now


def _kinds(row: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What a row of metrics has to say: ("step", n), ("held-out", n), or both."""
    found = {"step": "reward/mean", "held-out": "eval/accuracy"}
    return [(kind, row["step"]) for kind, name in found.items() if name in row]


def step_line(state: Snapshot) -> str:
    """One training step in one line."""
    parts = [f"step {state.step:>{len(str(state.steps))}}/{state.steps}"]
    if state.accuracy:
        parts.append(f"accuracy {state.accuracy[-1]:6.1%}")
    if state.reward is not None:
        parts.append(f"reward {state.reward:6.3f}")
    if state.max_staleness is not None:
        parts.append(f"staleness ≤ {state.max_staleness:.0f}")
    if state.generated_per_second is not None:
        parts.append(f"generated {state.generated_per_second:,.0f} tokens/s")
    if state.trained_per_second is not None:
        parts.append(f"trained {state.trained_per_second:,.0f} tokens/s")
    return "  ".join(parts)


def activity(state: Snapshot) -> str:
    """What every process does now, in one line."""
    if not state.members:
        return "starting"
    return ", ".join(f"{m.name} {words(m.phase)}" for m in state.members) + (
        f"; the next batch waits for {state.waiting_for}" if state.waiting_for else ""
    )


def words(phase: str) -> str:
    """A phase's name for people: "waiting:weights" is "waits for weights"."""
    kind, _, whom = phase.partition(":")
    return f"waits for {whom}" if kind == "waiting" and whom else phase.replace("_", " ")


class FullView(NoView):
    """The whole state on one screen, redrawn about once per second."""

    def __init__(self, config: Mapping[str, Any], workdir: str | os.PathLike):
        from rich.console import Console
        from rich.live import Live

        super().__init__(config, workdir)
        self._status = StatusPoller(workdir, config["metrics"]["refresh_seconds"])
        self._live = Live(console=Console(), auto_refresh=False, transient=False)
        self._events: deque[str] = deque(maxlen=5)
        self._started, self._drawn = time.monotonic(), float("-inf")
        self._metrics = MetricsReader(workdir, NAMES)

    def __enter__(self) -> FullView:
        self._status.start()
        with contextlib.suppress(OSError):  # as in `say`
            self._live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._draw()
        with contextlib.suppress(OSError):
            self._live.__exit__(*error)
        self._status.stop()

    def tell(self, text: str) -> None:
        self._events.append(f"{time.strftime('%H:%M:%S')} {text}")

    def tick(self) -> None:
        if time.monotonic() - self._drawn >= self._config["metrics"]["refresh_seconds"]:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._metrics.read()
        state = snapshot(self._metrics.rows, self._status.data, self._config)
        title = f"{self._config['name']}  ·  {self._workdir}"
        with contextlib.suppress(OSError):
            self._live.update(screen(state, title, self._drawn - self._started, list(self._events)), refresh=True)


def screen(state: Snapshot, title: str, seconds: float, events: list[str]):
    """The full view as one rich renderable."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    minutes = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    facts.add_row("step", f"{state.step} of {state.steps}   {minutes}   {bar(state.step / max(1, state.steps), 30)}")
    if state.held_out:
        facts.add_row("held-out accuracy", " → ".join(f"{value:.1%}" for _, value in _ends(state.held_out)))
    if state.accuracy:
        line = sparkline(state.accuracy, 50, 0.0, 1.0)
        facts.add_row("training accuracy", Text.assemble(f"{state.accuracy[-1]:6.1%}  ", (line, "green")))
    numbers = {"reward": state.reward, "answer length": state.lengths, "entropy": state.entropy}
    facts.add_row("", "   ".join(f"{name} {value:.3f}" for name, value in numbers.items() if value is not None))
    facts.add_row("generated", rate(state.generated_per_second))
    facts.add_row("trained", rate(state.trained_per_second))
    queue = {"groups running": state.running, "ready to train": state.queue}
    known = [f"{value:.0f} {name}" for name, value in queue.items() if value is not None]
    facts.add_row("queue", ", ".join(known) or "–")
    if state.waiting_for:
        facts.add_row("next batch", Text(f"waits for {state.waiting_for}"))
    worst = "–" if state.max_staleness is None else f"at most {state.max_staleness:.0f}"
    facts.add_row("staleness", f"{worst}, bound {state.bound}, {state.dropped:.0f} groups dropped")
    total = sum(state.staleness)
    for lag, count in enumerate(state.staleness):
        facts.add_row("", f"{lag:>2}  {bar(count / total if total else 0, 30)} {count / total if total else 0:6.1%}")

    if state.mismatch:
        found = ", ".join(f"{value:.1e} at {kind}" for kind, value in state.mismatch.items())
        facts.add_row("engine ↔ trainer", f"mean |Δ log-prob| {found}")
    if state.warning:
        facts.add_row("", Text(state.warning, "yellow"))

    people = Table.grid(padding=(0, 2))
    for member in state.members:
        busy = f"{bar(member.busy, 12)} {member.busy:4.0%} busy"
        people.add_row(member.name, words(member.phase), busy, member.detail)
    if not state.members:
        people.add_row("starting …")
    parts = [Panel(facts, title=title, title_align="left"), Panel(people, title="who does what", title_align="left")]
    if events:
        parts.append(Panel("\n".join(events), title="events", title_align="left"))
    return Group(*parts)


def bar(share: float, width: int) -> str:
    """A share from 0 to 1 as a bar of fixed width."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return "█" * filled + "░" * (width - filled)


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} tokens/s"


def _ends(values):
    return values if len(values) < 2 else (values[0], values[-1])


class StatusPoller:
    """Asks the controller for its status in a thread of its own; `data` is the newest answer, {} before the first."""

    def __init__(self, workdir: str | os.PathLike, seconds: float):
        self.data: dict[str, Any] = {}
        self._workdir, self._seconds = workdir, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        from areal_jax.transport.errors import TransportError
        from areal_jax.transport.messages import GetStatus
        from areal_jax.transport.sockets import SyncClient

        while not self._stop.is_set():
            with contextlib.suppress(TransportError), SyncClient("launch", self._workdir) as client:
                while not self._stop.wait(self._seconds):
                    self.data = dict(client.request(GetStatus(), timeout=2.0).data)
            self._stop.wait(self._seconds)
