"""Every message that crosses a process boundary, as typed msgpack structs; nothing on the wire can run code.

The controller is the hub. Rollout workers, reward services and trainer processes connect to it; a rollout worker also
connects to the reward services. Arrays travel as (dtype, shape, bytes) with an allow-list of dtypes. Decoding checks
the type of every field: what does not fit raises `msgspec.ValidationError` and is refused and counted by the socket.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

PROTOCOL = 2
_DTYPES = ("bool", "uint8", "int32", "int64", "float32")
_NAMES = {np.dtype(name): name for name in _DTYPES}  # numpy makes a dtype's name anew each time, in Python


class Message(msgspec.Struct, tag_field="type", frozen=True, omit_defaults=True):
    """Base of everything that is sent on its own."""


# --- What a rollout produces ---------------------------------------------------------------------------------------


class Trajectory(msgspec.Struct, frozen=True):
    """One token sequence to train on: prompt, generated tokens and tool output, in the order the model saw them.

    All arrays have shape [T] and are aligned with the token they describe.
    """

    tokens: np.ndarray  # int32
    loss_mask: np.ndarray  # bool: True where the token was sampled by the policy
    logprobs: np.ndarray  # float32: of the distribution really sampled from; 0 where loss_mask is False
    versions: np.ndarray  # int32: weights that sampled the token; -1 where loss_mask is False
    reward: float  # shaped, what is trained on
    finish_reason: str  # "stop" or "length", of the last generation
    metrics: dict[str, float] = {}  # named numbers to average, "accuracy" among them

    @property
    def oldest_version(self) -> int:
        """The oldest version among sampled tokens; the lag of a sample is counted from it."""
        return int(self.versions[self.loss_mask].min())


class Task(msgspec.Struct, frozen=True):
    """One sample to generate. (seed, group, sample) fixes its random numbers, wherever and whenever it runs."""

    group: int  # submission number of the group, unique in the run; negative for evaluation
    sample: int  # 0 .. group size - 1
    record: dict[str, Any]  # the dataset's record: prompt, answer, other fields
    attempt: int = 0
    evaluation: bool = False  # sample greedily (or as the evaluation config says), do not train


class GroupResult(msgspec.Struct, frozen=True):
    """All samples of one prompt; samples[i] holds the trajectories of sample i (several for some workflows)."""

    group: int
    record_index: int
    epoch: int
    samples: list[list[Trajectory]]

    @property
    def oldest_version(self) -> int:
        return min(t.oldest_version for sample in self.samples for t in sample)


# --- Weights -------------------------------------------------------------------------------------------------------


class TensorSpec(msgspec.Struct, frozen=True):
    name: str  # Hugging Face name
    dtype: str  # "float32", "bfloat16", ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    checksum: int  # crc32 of the tensor's bytes


class Manifest(msgspec.Struct, frozen=True):
    """One version of the weights: where its bytes are, and what must be found there."""

    version: int
    nbytes: int
    tensors: list[TensorSpec]
    path: str  # file on the publisher's host (shared memory) or on a shared disk
    host: str  # the publisher's host name: elsewhere, fetch from `url` unless the disk is shared
    transport: str = "shm"  # "shm", "tcp" or "disk"
    url: str = ""  # tcp://host:port of the publisher's byte server
    published_at: float = 0.0  # seconds since the epoch, when the optimizer step was done


# --- Any role to the controller ------------------------------------------------------------------------------------


class Hello(Message, tag="hello"):
    role: str  # "rollout", "rewards", "trainer"
    name: str  # unique among the living; "rollout-0"
    host: str
    pid: int
    life: int = 0  # rollout: a number that the process drew when it began, as a successor may have the same `pid`
    protocol: int = PROTOCOL
    slots: int = 0  # rollout: how many samples it runs at once
    version: int = -1  # rollout: the weights it has; -1 for none
    running: list[tuple[int, int, int]] = []  # rollout, after a lost controller: (group, sample, attempt) it works on


class Heartbeat(Message, tag="heartbeat"):
    name: str
    phase: str  # what it does now: "generating", "training", "waiting:batch", ...
    clock: dict[str, float] = {}  # seconds spent in each phase since its start; they add up to its age
    counters: dict[str, float] = {}  # cumulative, e.g. tokens_generated
    gauges: dict[str, float] = {}  # momentary, e.g. running, version


class Goodbye(Message, tag="goodbye"):
    name: str
    reason: str = ""
    died: bool = False  # not told to: a rollout worker's engine ended, perhaps because of what it ran


# --- Controller and rollout worker ---------------------------------------------------------------------------------


class Welcome(Message, tag="welcome"):
    heartbeat_seconds: float


class Refused(Message, tag="refused"):
    """The answer to a message that cannot be served; says why and what to do."""

    reason: str


class Assign(Message, tag="assign"):
    tasks: list[Task]


class Cancel(Message, tag="cancel"):
    tasks: list[tuple[int, int]]  # (group, sample)


class UpdateWeights(Message, tag="update_weights"):
    manifest: Manifest


class Shutdown(Message, tag="shutdown"):
    reason: str = ""


class SampleDone(Message, tag="sample_done"):
    name: str
    group: int
    sample: int
    attempt: int
    trajectories: list[Trajectory]


class SampleFailed(Message, tag="sample_failed"):
    """An infrastructure failure (verifier, engine, workflow), never a score."""

    name: str
    group: int
    sample: int
    attempt: int
    error: str  # short name, e.g. "verifier_timeout": it is counted under this name
    detail: str = ""


class WeightsLoaded(Message, tag="weights_loaded"):
    name: str
    version: int
    published_at: float = 0.0  # of the manifest that it was told to load
    timings: dict[str, float] = {}  # seconds: read, convert, load, pause, recompute
    error: str = ""  # not empty: the version was refused, the worker stays on the old one


# --- Controller and trainer: request, reply ------------------------------------------------------------------------


class GetBatch(Message, tag="get_batch"):
    """Ask for the batch of training step `version`. Asking again for the same version gives the same batch."""

    version: int


class Batch(Message, tag="batch"):
    """The groups of one training step, oldest first. The last of finite data may be short; an empty one is the end."""

    version: int
    groups: list[GroupResult]
    report: dict[str, float] = {}  # the controller's own metrics for this step (queue, staleness, dropped, ...)


class NotReady(Message, tag="not_ready"):
    """Nothing yet; ask again. `waiting_for` names who or what the controller waits for."""

    waiting_for: str
    disk: bool = False  # its disk is full, which has a limit of its own


class Publish(Message, tag="publish"):
    """Trainer: this version exists (its batch, version - 1, is consumed for good). The answer is `Published`."""

    manifest: Manifest


class Published(Message, tag="published"):
    version: int


class Evaluate(Message, tag="evaluate"):
    """Run the evaluation set on exactly this version; asking again polls."""

    version: int


class EvaluationResult(Message, tag="evaluation_result"):
    version: int
    accuracy: float | None  # None: every sample failed
    samples: int
    failed: int
    metrics: dict[str, float] = {}


class GetState(Message, tag="get_state"):
    """Ask for the controller's whole state as of training step `version` (every earlier batch consumed)."""

    version: int


class State(Message, tag="state"):
    version: int
    data: bytes  # msgpack of the controller's state


class SetState(Message, tag="set_state"):
    """Trainer, on resume: go on from this state. The answer is `Published`; then publish that very version."""

    version: int
    data: bytes


class GetStatus(Message, tag="get_status"):
    """For people: the live view and the final report."""


class Status(Message, tag="status"):
    data: dict[str, Any]


class Finish(Message, tag="finish"):
    """Trainer: the run is over; the controller answers `Status` with its final report and shuts the workers down."""


# --- Rollout worker and reward service -----------------------------------------------------------------------------


class Verify(Message, tag="verify"):
    request: int
    record: dict[str, Any]
    prompt: str
    completion: str
    prompt_tokens: list[int]
    completion_tokens: list[int]


class Score(Message, tag="score"):
    request: int
    reward: float
    metrics: dict[str, float] = {}


class VerifyFailed(Message, tag="verify_failed"):
    request: int
    error: str
    detail: str = ""


AnyMessage = (
    Hello | Heartbeat | Goodbye | Welcome | Refused | Assign | Cancel | UpdateWeights | Shutdown | SampleDone
    | SampleFailed | WeightsLoaded | GetBatch | Batch | NotReady | Publish | Published | Evaluate | EvaluationResult
    | GetState | State | SetState | GetStatus | Status | Finish | Verify | Score | VerifyFailed
)  # fmt: skip


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Decode one message; raises `msgspec.MsgspecError` on anything that is not exactly one of ours."""
    return _decoder.decode(data)


def encode_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if (name := _NAMES.get(value.dtype)) is None:
            raise TypeError(f"arrays of {value.dtype} are not sent; use one of {_DTYPES}")
        return name, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def decode_hook(kind: type, value: Any) -> Any:
    if kind is not np.ndarray:
        raise ValueError(f"{kind} cannot be received")
    dtype, shape, data = value
    if dtype not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"not an array: dtype {dtype!r}, shape {shape!r}")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"array of {dtype}{list(shape)} came with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_decoder = msgspec.msgpack.Decoder(AnyMessage, dec_hook=decode_hook)
