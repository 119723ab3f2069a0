import itertools
import json
import threading
from pathlib import Path

import pytest

from areal_jax.metrics.clock import Clock, idle_fraction, trace_path


class Seconds:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_phases_add_up_to_age():
    time = Seconds()
    clock = Clock(time_source=time)
    time.now += 2
    clock.enter("generating")
    time.now += 5
    with clock.phase("loading_weights"):
        time.now += 1
        with clock.phase("waiting:trainer"):
            time.now += 0.5
        time.now += 1
    assert clock.current == "generating"
    time.now += 3
    assert clock.totals() == {"starting": 2, "generating": 8, "loading_weights": 2, "waiting:trainer": 0.5}
    assert sum(clock.totals().values()) == clock.age() == 12.5


def test_phase_is_left_when_its_block_raises():
    clock = Clock("idle", Seconds())
    with pytest.raises(KeyError), clock.phase("training"):
        raise KeyError
    assert clock.current == "idle"


def test_threads_lose_no_time():
    ticks = iter(range(10**9))
    clock = Clock("idle", lambda: next(ticks))

    def work(name):
        for _ in range(500):
            clock.enter(name)

    threads = [threading.Thread(target=work, args=(f"phase {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = clock.totals()
    assert sum(totals.values()) == next(ticks) - 1  # every tick but the one just drawn belongs to a phase


def test_idle_fraction_leaves_out_the_start():
    assert idle_fraction({"starting": 50, "training": 6, "waiting:batch": 3, "idle": 1}) == 0.4
    assert idle_fraction({}) == 0.0


def test_a_trace_holds_every_phase_without_gaps(tmp_path):
    time = Seconds()
    path = trace_path(tmp_path, "rollout-0")
    clock = Clock(time_source=time, trace=path)
    for phase in ("generating", "generating", "idle", "generating"):
        time.now += 1.5
        clock.enter(phase)
    spans = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [span["phase"] for span in spans] == ["starting", "generating", "idle"]
    assert [round(span["end"] - span["start"], 3) for span in spans] == [1.5, 3.0, 1.5]
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(spans))
