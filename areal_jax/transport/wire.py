"""The frame around a message, and the guard that every incoming frame passes before anyone acts on it.

A message travels as two frames: a header (magic, the sender's session, a sequence number, a request number) and the
msgpack of `messages`. Sequence numbers of a session only rise, so a replayed or re-ordered message is noticed. The
request number of a request is repeated in its reply; it is 0 for messages that ask for nothing.
"""

from __future__ import annotations

import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from areal_jax.transport.errors import MessageTooLarge
from areal_jax.transport.messages import AnyMessage, Message, decode, encode

MAGIC = b"AJX1"
HEADER = struct.Struct(">4sQQQ")
MAX_BYTES = 1 << 30  # of one message
NEVER = 1 << 62  # for `mute_after`


def frames(session: int, sequence: int, request: int, message: Message, max_bytes: int) -> list[bytes]:
    """Header and payload of one outgoing message; raises `MessageTooLarge`."""
    payload = encode(message)
    if len(payload) > max_bytes:
        raise MessageTooLarge(
            f"{type(message).__name__} has {len(payload)} bytes, the limit is {max_bytes}: use smaller batches or "
            f"a larger max_bytes on both sides"
        )
    return [HEADER.pack(MAGIC, session, sequence, request), payload]


@dataclass
class PeerRecord:
    """What the guard remembers of one peer."""

    session: int = -1
    sequence: int = -1
    accepted: int = 0
    in_a_row: int = 0  # refusals since the last good message
    refused: Counter[str] = field(default_factory=Counter)
    why: str = ""  # the last refusal, in words
    last: tuple[str, float] = ("", 0.0)  # kind of the last good message, and when it came


class Guard:
    """Opens incoming frames; what is not a message of ours, in order and of bounded size, is refused and counted.

    A peer with `mute_after` refusals in a row is muted: its frames are dropped unread until it comes with a new
    identity. Only the `max_peers` peers heard last are remembered.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, mute_after: int = 100, max_peers: int = 4096):
        self.max_bytes, self.mute_after, self.max_peers = max_bytes, mute_after, max_peers
        self.peers: OrderedDict[bytes, PeerRecord] = OrderedDict()
        self.refused: Counter[str] = Counter()  # over all peers, forgotten ones too
        self.accepted = 0

    def open(self, peer: bytes, parts: Sequence[bytes]) -> tuple[AnyMessage, int] | None:
        """The message and its request number, or None when it was refused (see `peers[peer].why`)."""
        record = self.peers.setdefault(peer, PeerRecord())
        self.peers.move_to_end(peer)
        while len(self.peers) > self.max_peers:
            self.peers.popitem(last=False)
        if record.in_a_row >= self.mute_after:
            return self._refuse(record, "muted", record.why)
        if len(parts) != 2 or len(parts[0]) != HEADER.size:
            return self._refuse(record, "malformed", f"{len(parts)} frames instead of a header and a payload")
        magic, session, sequence, request = HEADER.unpack(parts[0])
        if magic != MAGIC:
            return self._refuse(record, "malformed", f"protocol {magic!r} instead of {MAGIC!r}")
        if len(parts[1]) > self.max_bytes:
            return self._refuse(record, "oversized", f"{len(parts[1])} bytes, the limit is {self.max_bytes}")
        if session == record.session and sequence <= record.sequence:
            return self._refuse(record, "out_of_order", f"sequence {sequence} after {record.sequence}")
        try:
            message = decode(parts[1])
        except (msgspec.MsgspecError, RecursionError, MemoryError, OverflowError, UnicodeDecodeError) as error:
            return self._refuse(record, "malformed", f"{type(error).__name__}: {error}"[:200])
        record.session, record.sequence, record.in_a_row = session, sequence, 0
        record.accepted += 1
        self.accepted += 1
        told = getattr(message, "waiting_for", "")
        record.last = type(message).__name__ + (f", waiting for {told}" if told else ""), time.monotonic()
        return message, request

    def last_word(self, peer: bytes) -> str:
        """What `peer` said last and how long ago, for whoever has waited for it in vain."""
        record = self.peers.get(peer)
        if record is None or not record.accepted:
            return "it has never said anything"
        return f"it last said {record.last[0]}, {time.monotonic() - record.last[1]:.0f} s ago"

    def _refuse(self, record: PeerRecord, kind: str, why: str) -> None:
        record.in_a_row += 1
        record.refused[kind] += 1
        record.why = why
        self.refused[kind] += 1

    def refused_by_peer(self) -> dict[str, dict[str, int]]:
        """{peer: {kind: count}} of the peers that had anything refused."""
        return {
            peer.decode(errors="replace"): dict(record.refused) for peer, record in self.peers.items() if record.refused
        }
