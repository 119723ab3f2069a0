"""Where servers are: one small file per server below the run's folder, and the CURVE keys beside it.

A server that binds any free port writes its real endpoint to `WORKDIR/endpoints/NAME`; clients wait for that file.
Keys are made once per run by `make_keys`: one pair for all servers, one for all clients, in files of mode 0600.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from areal_jax.disk import write_whole
from areal_jax.transport.errors import EndpointMissing, KeysMissing, TransportError


def write_endpoint(workdir: str | Path, name: str, endpoint: str) -> None:
    """Announce atomically that server `name` listens at `endpoint`."""
    folder = Path(workdir) / "endpoints"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / name, endpoint)


def forget_endpoints(workdir: str | Path) -> None:
    """No server of the run listens any more, so that nobody must try these addresses."""
    for path in (Path(workdir) / "endpoints").glob("*"):
        path.unlink(missing_ok=True)


def read_endpoint(workdir: str | Path, name: str) -> str | None:
    """The endpoint that server `name` announced last, or None."""
    try:
        return (Path(workdir) / "endpoints" / name).read_text() or None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the second: of NFS, while another host replaces it
            raise
        return None


def endpoint_mark(workdir: str | Path, name: str) -> object:
    """Changes with every announcement of server `name`, though the address be the same; None without one."""
    return _mark(Path(workdir) / "endpoints" / name)


def still_starting(workdir: str | Path, name: str, seconds: float = 0.0) -> None:
    """Say that server `name` gets on with its start, or waits for the disk for `seconds`, which are slept here: it has
    no address yet and does not hang (`launch.announce_limit`)."""
    path = _starting(workdir, name)
    with contextlib.suppress(OSError):  # of a full disk; where the file is there already, it needs no room
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    time.sleep(seconds)


def starting_mark(workdir: str | Path, name: str) -> object:
    """Changes whenever server `name` says that it is `still_starting`; None before."""
    return _mark(_starting(workdir, name))


def _starting(workdir: str | Path, name: str) -> Path:
    return Path(workdir) / "endpoints" / f".{name}"


def _mark(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return None
    return found.st_ino, found.st_mtime_ns


def missing(workdir: str | Path, name: str, waited: float) -> EndpointMissing:
    return EndpointMissing(
        f"waited {waited:.1f} s for {name} to announce its address in {Path(workdir) / 'endpoints' / name}; "
        f"is that process running, and with this --workdir?"
    )


def wait_endpoint(workdir: str | Path, name: str, timeout: float) -> str:
    """Block until server `name` has announced its endpoint; raises `EndpointMissing` after `timeout` seconds."""
    started = time.monotonic()
    while (endpoint := read_endpoint(workdir, name)) is None:
        if time.monotonic() - started >= timeout:
            raise missing(workdir, name, timeout)
        time.sleep(0.02)
    return endpoint


# --- Addresses -----------------------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, str]:
    """("host", "port") of a tcp address; raises `TransportError` for anything else."""
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not host or not (port == "*" or (port.isdigit() and int(port) < 65536)):
        raise TransportError(f"{address!r} is not an address; write tcp://HOST:PORT or tcp://HOST:* for any free port")
    return host, port


def is_loopback(address: str) -> bool:
    """Whether only processes of this host can reach `address`."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def reachable(bound: str) -> str:
    """What clients should connect to when a socket is bound to `bound`: wildcards become this host's name."""
    host, port = split_address(bound)
    return f"tcp://{socket.gethostname()}:{port}" if host in ("0.0.0.0", "*", "[::]") else bound


# --- CURVE keys ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Z85-encoded CURVE keys of one run. A host that only runs clients needs no server secret."""

    server_public: bytes
    client_public: bytes
    client_secret: bytes
    server_secret: bytes | None

    def __repr__(self) -> str:  # secrets never reach a log
        return f"Keys(server_public={self.server_public!r})"


def make_keys(workdir: str | Path) -> Path:
    """Make the run's CURVE keys in `WORKDIR/keys` (0700, files 0600), unless they are there. Returns the folder."""
    folder = Path(workdir) / "keys"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    for owner in ("server", "client"):
        if (folder / f"{owner}.public").exists() and (folder / f"{owner}.secret").exists():
            continue
        public, secret = zmq.curve_keypair()
        for kind, key in (("secret", secret), ("public", public)):
            write_whole(folder / f"{owner}.{kind}", key, mode=0o600)
    return folder


def load_keys(workdir: str | Path) -> Keys | None:
    """The run's keys, or None where the run has none; raises `KeysMissing` for half a set."""
    folder = Path(workdir) / "keys"
    if not folder.is_dir():
        return None
    try:
        read = {name: (folder / name).read_bytes() for name in ("server.public", "client.public", "client.secret")}
        server_secret = (folder / "server.secret").read_bytes() if (folder / "server.secret").exists() else None
    except OSError as error:
        raise KeysMissing(f"the run's keys in {folder} cannot be read ({error.strerror}: {error.filename})") from None
    return Keys(
        server_public=read["server.public"],
        client_public=read["client.public"],
        client_secret=read["client.secret"],
        server_secret=server_secret,
    )


def encrypt(sock: zmq.Socket, keys: Keys, name: str) -> zmq.Socket:
    """Let only those with the run's client key connect to `sock` of server `name`, not bound yet. Returns the socket on
    which ZeroMQ asks who may: `admission` has the answer. Raises `KeysMissing`."""
    if keys.server_secret is None:
        raise KeysMissing(f"{name} is a server, and the run's keys folder holds no server.secret")
    questions = sock.context.socket(zmq.REP)
    questions.bind("inproc://zeromq.zap.01")
    sock.curve_secretkey, sock.curve_publickey = keys.server_secret, keys.server_public
    sock.curve_server, sock.zap_domain = True, b"run"
    return questions


def admission(question: list[bytes], keys: Keys) -> tuple[bool, list[bytes]]:
    """Whether a client has the run's client key, and so may connect, and how ZeroMQ is told (ZAP, RFC 27)."""
    version, request, *_ = question
    mechanism, *credentials = question[5:]
    allowed = z85.decode(keys.client_public)
    known = mechanism == b"CURVE" and len(credentials) == 1 and secrets.compare_digest(credentials[0], allowed)
    status = [b"200", b"OK"] if known else [b"400", b"not a key of this run"]
    return known, [version, request, *status, b"", b""]
