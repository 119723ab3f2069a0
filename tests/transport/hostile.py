"""Malformed messages, made from real ones."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from areal_jax.transport import messages as m
from areal_jax.transport import wire

TRAJECTORY = m.Trajectory(
    tokens=np.arange(4, dtype=np.int32),
    loss_mask=np.array([False, True, True, True]),
    logprobs=np.array([0, -1, -2, -3], np.float32),
    versions=np.array([-1, 0, 0, 1], np.int32),
    reward=1.0,
    finish_reason="stop",
    metrics={"accuracy": 1.0},
)
MANIFEST = m.Manifest(
    version=3, nbytes=8, tensors=[m.TensorSpec("a", "float32", (2,), 0, 77)], path="/x", host="h", published_at=1.0
)
TASK = m.Task(group=1, sample=0, record={"prompt": "1+1?", "answer": "2", "more": [1, {"a": None}]}, attempt=2)
REAL = [
    m.Hello(role="rollout", name="w", host="h", pid=1, running=[(1, 2, 3)]),
    m.Heartbeat(name="w", phase="generating", clock={"idle": 1.0}, counters={"tokens_generated": 5.0}),
    m.Goodbye(name="w", reason="done"),
    m.Assign(tasks=[TASK]),
    m.Cancel(tasks=[(1, 0)]),
    m.UpdateWeights(manifest=MANIFEST),
    m.SampleDone(name="w", group=1, sample=0, attempt=2, trajectories=[TRAJECTORY]),
    m.SampleFailed(name="w", group=1, sample=0, attempt=2, error="verifier_timeout"),
    m.WeightsLoaded(name="w", version=3, published_at=1.0, timings={"load": 0.1}),
    m.GetBatch(version=3),
    m.Batch(version=3, groups=[m.GroupResult(1, 2, 0, [[TRAJECTORY]])], report={"staleness/max": 1.0}),
    m.Publish(manifest=MANIFEST),
    m.Evaluate(version=3),
    m.SetState(version=3, data=b"\x80"),
    m.GetStatus(),
    m.Verify(request=1, record={"answer": "2"}, prompt="p", completion="c", prompt_tokens=[1], completion_tokens=[2]),
    m.Score(request=1, reward=1.0),
]
# What a msgpack reader must survive: huge claimed lengths, deep nesting, odd types, extensions.
NASTY = [kind + b"\xff\xff\xff\xff" for kind in (b"\xdd", b"\xdf", b"\xc6", b"\xc9")]
NASTY += [b"\x91" * 900, b"\xc1", b"\xd4\x05\x00"]


@st.composite
def malformed(draw, session=5):
    """Frames of a damaged real message: cut, changed, put together wrongly, or with a wrong header."""
    header, payload = wire.frames(session, draw(st.integers(1, 2**40)), 0, draw(st.sampled_from(REAL)), wire.MAX_BYTES)
    at = draw(st.integers(0, len(payload)))
    match draw(st.sampled_from(["cut", "flip", "insert", "nasty", "join", "header", "frames", "other"])):
        case "cut":
            payload = payload[:at]
        case "flip":
            wrong = bytearray(payload)
            for place in draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
                wrong[place] ^= draw(st.integers(1, 255))
            payload = bytes(wrong)
        case "insert":
            payload = payload[:at] + draw(st.binary(min_size=1, max_size=20)) + payload[at:]
        case "nasty":
            payload = payload[:at] + draw(st.sampled_from(NASTY)) + payload[at + 1 :]
        case "join":
            payload = payload[:at] + m.encode(draw(st.sampled_from(REAL)))
        case "header":
            header = draw(st.binary(max_size=40))
        case "frames":
            return draw(st.permutations([header, payload, header][: draw(st.integers(1, 3))]))
        case "other":
            payload = draw(st.binary(max_size=200))
    return [header, payload]


def opens(frames) -> bool:
    """Whether these frames are, in spite of everything, a message."""
    return wire.Guard(max_bytes=wire.MAX_BYTES).open(b"x", frames) is not None
