"""Who may listen and connect: keys, addresses, ports."""

import asyncio

import pytest

from areal_jax.transport.endpoints import is_loopback, load_keys, make_keys, write_endpoint
from areal_jax.transport.errors import KeysMissing, TransportError
from areal_jax.transport.messages import Hello
from areal_jax.transport.sockets import Client, Server

LOOPBACK = "tcp://127.0.0.1:*"


def hello(name="rollout-0"):
    return Hello(role="rollout", name=name, host="h", pid=1)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_a_client_without_the_runs_key_gets_nothing(tmp_path):
    make_keys(tmp_path / "run")
    make_keys(tmp_path / "other")
    (tmp_path / "plain").mkdir()

    async def body():
        async with Server(LOOPBACK, "controller", tmp_path / "run") as server:
            for folder in ("other", "plain"):
                write_endpoint(tmp_path / folder, "controller", server.endpoint)
            # the right server key, but a client key that the run does not know
            keys, public = tmp_path / "other" / "keys", (tmp_path / "run" / "keys" / "server.public").read_bytes()
            (keys / "server.public").write_bytes(public)
            strangers = [Client("x", tmp_path / folder, hello=hello) for folder in ("other", "plain")]
            for stranger in strangers:
                await stranger.open()
            async with Client("a", tmp_path / "run", hello=hello) as _:
                assert (await server.receive())[0].name == "a"
                while not server.unauthenticated:
                    await asyncio.sleep(0.01)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(server.receive(), 0.3)
            for stranger in strangers:
                assert stranger.disconnected_for > 0
                stranger.close()

    run(body())


def test_beyond_loopback_keys_are_required(tmp_path):
    async def body():
        with pytest.raises(KeysMissing, match=r"may not listen on tcp://0\.0\.0\.0:\* without encryption"):
            Server("tcp://0.0.0.0:*", "controller", tmp_path)
        write_endpoint(tmp_path, "controller", "tcp://192.0.2.1:5555")
        with pytest.raises(KeysMissing, match="beyond this host"):
            await Client("a", tmp_path).open()
        make_keys(tmp_path)
        async with Server("tcp://0.0.0.0:*", "controller", tmp_path) as server:
            assert server.endpoint.startswith("tcp://") and "0.0.0.0" not in server.endpoint

    run(body())


def test_addresses():
    assert is_loopback("tcp://127.0.0.1:*") and is_loopback("tcp://localhost:80") and is_loopback("tcp://[::1]:80")
    assert not is_loopback("tcp://*:80") and not is_loopback("tcp://10.0.0.1:80") and not is_loopback("tcp://eth0:*")
    for wrong in ("127.0.0.1:5", "ipc:///tmp/x", "tcp://127.0.0.1", "tcp://:5", "tcp://127.0.0.1:x", "tcp://a:70000"):
        with pytest.raises(TransportError, match="is not an address"):
            is_loopback(wrong)


def test_a_port_in_use_is_one_clear_line(tmp_path):
    async def body():
        async with Server(LOOPBACK, "controller", tmp_path) as server:
            with pytest.raises(TransportError, match=r"rewards-0 cannot listen on tcp.*: Address already in use"):
                Server(server.endpoint, "rewards-0", tmp_path)

    run(body())


def test_keys_are_made_once_and_only_for_the_owner(tmp_path):
    folder = make_keys(tmp_path)
    keys = load_keys(tmp_path)
    assert (folder.stat().st_mode & 0o777, (folder / "server.secret").stat().st_mode & 0o777) == (0o700, 0o600)
    make_keys(tmp_path)
    assert load_keys(tmp_path) == keys
    assert keys.client_secret.decode() not in repr(keys) and keys.server_secret.decode() not in repr(keys)
    (folder / "client.secret").unlink()
    with pytest.raises(KeysMissing, match="cannot be read"):
        load_keys(tmp_path)
