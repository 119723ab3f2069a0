"""What the controller tells: metrics with every batch, a status for the live view, and the final report."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from areal_jax.controller import diagnosis
from areal_jax.metrics.clock import idle_fraction
from areal_jax.transport.messages import Heartbeat, Hello, Trajectory

if TYPE_CHECKING:
    from areal_jax.controller.core import Core
    from areal_jax.controller.ledger import Group


@dataclass
class Party:
    """The last word of one process."""

    role: str
    name: str
    host: str
    pid: int
    heard: float
    phase: str = "starting"
    clock: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    beats: int = 0


class Telemetry:
    """Counts over the whole run, and over the window from the first batch taken to the last version published."""

    def __init__(self, now: float):
        self.born = now
        self.parties: dict[str, Party] = {}
        self.notes: deque[tuple[float, str]] = deque(maxlen=100)
        self.lags: Counter[int] = Counter()  # consumed groups by lag
        self.token_lags: Counter[int] = Counter()  # consumed tokens by lag
        self.generated: Counter[str] = Counter()  # over all rollout workers, dead ones too, as they report it
        self.received_samples = self.received_tokens = 0
        self._began: float | None = None  # the first batch was taken
        self._clock: Counter[str] = Counter()  # rollout seconds by phase since then
        self._window: dict[str, Any] = {"seconds": 0.0, "tokens": 0.0, "clock": {}}  # as of the last published version
        self._before = self._window  # the windows of controllers that were killed, added up
        self._last: Counter[str] = Counter()  # counters at the last batch
        self._last_at = now
        self._received_at_last = 0

    def note(self, text: str, now: float) -> None:
        """Something for people to read."""
        self.notes.append((now - self.born, text))

    # --- Roles -----------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, now: float) -> None:
        self.parties[hello.name] = Party(hello.role, hello.name, hello.host, hello.pid, now)
        self.note(f"{hello.name} said hello from {hello.host} (process {hello.pid})", now)

    def heartbeat(self, beat: Heartbeat, now: float) -> None:
        party = self.parties[beat.name]
        if party.role == "rollout" and party.beats:  # the first beat is where counting begins
            for name, value in beat.counters.items():
                self.generated[name] += max(0.0, value - party.counters.get(name, 0.0))
            if self._began is not None:
                for phase, seconds in beat.clock.items():
                    self._clock[phase] += max(0.0, seconds - party.clock.get(phase, 0.0))
        elif party.role == "rollout" and sum(beat.clock.values()) < now - self.born:
            self.generated.update(beat.counters)  # unless it is older than this controller and was counted before
        party.heard, party.phase = now, beat.phase
        party.clock, party.counters, party.gauges = beat.clock, beat.counters, beat.gauges
        party.beats += 1

    def gone(self, name: str) -> Party | None:
        """Forget `name`."""
        return self.parties.pop(name, None)

    def silent(self, now: float, limit: float) -> list[Party]:
        """Forget the parties that have said nothing for more than `limit` seconds, and return them."""
        return [self.parties.pop(p.name) for p in list(self.parties.values()) if now - p.heard > limit]

    # --- Samples and batches ---------------------------------------------------------------------------------------

    def sample(self, trajectories: Sequence[Trajectory]) -> None:
        self.received_samples += 1
        self.received_tokens += sum(int(t.loss_mask.sum()) for t in trajectories)

    def training_began(self, now: float) -> None:
        if self._began is None:
            self._began = now
            self._tokens_at_first = self._tokens()

    def published(self, now: float) -> None:
        if self._began is not None:
            self._window = {
                "seconds": now - self._began,
                "clock": dict(self._clock),
                "tokens": self._tokens() - self._tokens_at_first,
            }

    def consumed(self, version: int, groups: Sequence[Group]) -> None:
        """Batch `version` is trained on for good."""
        count_lags(version, groups, self.lags, self.token_lags)

    def _tokens(self) -> float:
        """Tokens generated so far: as the workers say or, where they do not, those of the samples received."""
        return self.generated.get("tokens_generated", 0.0) or float(self.received_tokens)

    def batch(self, core: Core, version: int, groups: Sequence[Group], depth: int, now: float) -> dict[str, float]:
        """The report of batch `version`, which is taken now."""
        lags = np.array([version - group.oldest for group in groups] or [0])
        token_lags: Counter[int] = Counter()
        count_lags(version, groups, Counter(), token_lags)
        spans = [1 + np.count_nonzero(np.diff(t.versions[t.loss_mask])) for t in trajectories(groups)]
        now_counts = self._counts(core)
        since = now_counts - self._last
        seconds = max(now - self._last_at, 1e-9)
        report = {
            "staleness/mean": float(lags.mean()),
            "staleness/max": float(lags.max()),
            "staleness/min": float(lags.min()),
            "staleness/token_mean": sum(lag * n for lag, n in token_lags.items()) / max(1, token_lags.total()),
            "staleness/spans": float(np.mean(spans)) if spans else 0.0,
            "staleness/bound": float(core.config.max_staleness),
            "staleness/dropped": float(since["dropped_stale"]),
            "staleness/dropped_total": float(core.counters["dropped_stale"]),
            "queue/depth": float(depth),
            "queue/left": float(depth - len(groups)),
            "queue/running": float(len(core.ledger.open)),
            "queue/running_samples": float(sum(worker.load for worker in core.fleet)),
            "queue/waiting_samples": float(len(core.ledger.queued)),
            "queue/capacity": float(max(0, core.capacity)),
            "rollout/workers": float(len(core.fleet.workers)),
            "rollout/filtered": float(since["filtered"]),
            "rollout/filtered_total": float(core.counters["filtered"]),
            "rollout/failed": float(since["failed"]),
            "rollout/failed_total": float(core.failed.total()),
            "rollout/quarantined_total": float(core.counters["quarantined"]),
            "data/epoch": float(core.ledger.epoch + core.ledger.cursor / max(1, core.ledger.size)),
            # Of the samples that came: workers count their tokens once per heartbeat, and a step may be shorter.
            "perf/gen_tokens_per_s": (self.received_tokens - self._received_at_last) / seconds,
        }
        report |= {f"staleness/hist_{lag}": float((lags == lag).sum()) for lag in range(int(lags.max()) + 1)}
        for worker in core.fleet:  # of each part the slowest worker's, in its last update
            for part, took in worker.timings.items():
                report[f"update/{part}"] = max(took, report.get(f"update/{part}", 0.0))
        self._last, self._last_at, self._received_at_last = now_counts, now, self.received_tokens
        return report

    def counts_restored(self, core: Core) -> None:
        """The counts of `core` are those of a former life: the next batch reports what comes from now on."""
        self._last = self._counts(core)

    def _counts(self, core: Core) -> Counter[str]:
        return Counter(core.counters) + Counter({"failed": core.failed.total()})

    def save(self) -> dict[str, dict[str, float]]:
        """What the next controller must know, should this one be killed."""
        window = self._whole_window()
        return {
            "generated": dict(self.generated),
            "received": {"samples": self.received_samples, "tokens": self.received_tokens},
            "window": {"seconds": window["seconds"], "tokens": window["tokens"]},
            "clock": window["clock"],
        }

    def load(self, saved: dict[str, dict[str, float]]) -> None:
        """Take over what `save` gave; the time in between is not counted."""
        self.generated = Counter(saved["generated"])
        self.received_samples = int(saved["received"]["samples"])
        self.received_tokens = int(saved["received"]["tokens"])
        self._before = {**saved["window"], "clock": saved["clock"]}
        self._received_at_last = self.received_tokens

    def _whole_window(self) -> dict[str, Any]:
        """Seconds, tokens and rollout clock from the first batch taken to the last version published."""
        now, before = self._window, self._before
        clock = Counter(before["clock"])
        clock.update(now["clock"])
        return {
            "seconds": before["seconds"] + now["seconds"],
            "tokens": before["tokens"] + now["tokens"],
            "clock": dict(clock),
        }

    # --- Status and final report -----------------------------------------------------------------------------------

    def totals(self, core: Core) -> dict[str, Any]:
        """Counts of the whole run, in the names that `summary.json` uses."""
        return {
            "trained_groups": core.counters["trained_groups"],
            "trained_samples": core.counters["trained_samples"],
            "staleness_bound": core.config.max_staleness,
            "max_staleness": max(self.lags, default=0),
            "staleness_histogram": {str(lag): n for lag, n in sorted(self.lags.items())},
            "token_staleness_histogram": {str(lag): n for lag, n in sorted(self.token_lags.items())},
            "dropped_stale": core.counters["dropped_stale"],
            "dropped_stale_samples": core.counters["dropped_stale_samples"],
            "filtered": core.counters["filtered"],
            "failed": dict(core.failed),
            "quarantined": core.counters["quarantined"],
            "quarantined_prompts": list(core.quarantined),
            "skipped_records": core.skipped_records,
            "late_results": core.counters["late_results"],
            "duplicate_results": core.counters["duplicate_results"],
            "overtaken_loads": core.counters["overtaken_loads"],
            "workers_died": core.counters["workers_died"],
            "epochs": core.ledger.epochs_done[-10:],
            "received_samples": self.received_samples,
            "generated_tokens": int(self._tokens()),
        }

    def final(self, core: Core, now: float) -> dict[str, Any]:
        """Idle share and throughput of the rollout side are those between the first and the last training step."""
        window = self._whole_window()
        return self.totals(core) | {
            "rollout_idle_fraction": idle_fraction(window["clock"]),
            "rollout_seconds": window["clock"],
            "generated_tokens_per_second": window["tokens"] / window["seconds"] if window["seconds"] else 0.0,
        }

    def status(self, core: Core, now: float) -> dict[str, Any]:
        """A picture of this moment."""
        return self.totals(core) | {
            "seconds": now - self.born,
            "version": core.version,
            "next_batch": core.next_batch,
            "batch_size": core.config.batch_size,
            "group_size": core.config.group_size,
            "epoch": core.ledger.epoch,
            "prompts_drawn": core.ledger.cursor,
            "prompts": core.ledger.size,
            "queue_depth": len(core.buffer),
            "running_groups": len(core.ledger.open),
            "running_samples": sum(worker.load for worker in core.fleet),
            "waiting_samples": len(core.ledger.queued),
            "capacity": core.capacity,
            "oldest_waiting": min((g.oldest for g in core.buffer.groups.values()), default=None),
            "waiting_for": core.stopped or diagnosis.waiting_for(core, now),
            "evaluating": diagnosis.evaluation(core, now) if core.evaluations.current else None,
            "stopped": core.stopped,
            "finished": core.finished,
            "notes": [f"{at:.1f} s: {text}" for at, text in list(self.notes)[-20:]],
            "rollout_idle_fraction": idle_fraction(dict(self._clock)),
            "roles": {
                party.name: {
                    "role": party.role,
                    "host": party.host,
                    "pid": party.pid,
                    "phase": party.phase,
                    "heard": now - party.heard,
                    "clock": party.clock,
                    "counters": party.counters,
                    "gauges": party.gauges,
                }
                | self._worker(core, party.name)
                for party in self.parties.values()
            },
        }

    def _worker(self, core: Core, name: str) -> dict[str, Any]:
        worker = core.fleet.workers.get(name)
        if worker is None:
            return {}
        return {
            "version": worker.version,
            "updating": worker.updating,
            "slots": worker.slots,
            "running": len(worker.running),
            "evaluating": len(worker.evaluating),
            "load_timings": worker.timings,
        }


def trajectories(groups: Iterable[Group]) -> Iterator[Trajectory]:
    return (t for group in groups for sample in group.samples for t in sample.trajectories)


def count_lags(version: int, groups: Sequence[Group], lags: Counter[int], token_lags: Counter[int]) -> None:
    """Add the lags of batch `version` to the histograms: of groups, and of sampled tokens."""
    lags.update(version - group.oldest for group in groups)
    if sampled := [t.versions[t.loss_mask] for t in trajectories(groups)]:
        for lag, count in zip(*np.unique(version - np.concatenate(sampled), return_counts=True), strict=True):
            token_lags[int(lag)] += int(count)
