"""Typed messages (`messages`) over ZeroMQ (`sockets`): how the roles talk. No jax, no pickle."""
