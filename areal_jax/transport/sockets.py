"""ZeroMQ sockets for `messages`: an asyncio `Server` and `Client`, and a blocking `SyncClient` for request and reply.

    async with Server("tcp://127.0.0.1:*", "controller", workdir) as server:     # announces its endpoint
        async for peer, message in server:
            await server.send(peer, Welcome(...))                # False when the peer is gone or does not read

    async with Client("rollout-0", workdir, hello=lambda: Hello(...)) as client:  # finds "controller"
        await client.send(Heartbeat(...))
        async for message in client: ...

    with SyncClient("trainer-0", workdir) as client:
        batch = client.request(GetBatch(version=3), timeout=60)  # asked again by itself; requests are idempotent

Sending never waits for a slow peer beyond the high-water mark. Peers are read in turn (ZeroMQ's fair queue), so that
one that floods delays nobody. Clients follow a server that comes back, at its old address or a new one.
"""

from areal_jax.transport.client import Client
from areal_jax.transport.heartbeat import HeartbeatThread
from areal_jax.transport.options import HELLO_FIRST
from areal_jax.transport.server import Peer, Server
from areal_jax.transport.sync_client import SyncClient

__all__ = ["HELLO_FIRST", "Client", "HeartbeatThread", "Peer", "Server", "SyncClient"]
