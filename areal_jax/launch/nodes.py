"""Which roles of a run are on which node of a cluster: a plain function of the settings and the number of nodes.

The first node has the controller; reward services, which may need many cores, are on all nodes. With
`launch.trainer_nodes` the first so many nodes train and the others generate; without, every node does both. A trainer
process's neighbours in number are its neighbours on the node, so that tensor parallel devices, the innermost axis of
the mesh, are on one node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from areal_jax.config import ConfigError
from areal_jax.transport.endpoints import is_loopback


@dataclasses.dataclass(frozen=True)
class Share:
    """What one node runs: by number, of the reward services, the trainer's processes and the rollout workers."""

    controller: bool
    services: range
    trainers: range
    workers: range


def share_of(config: Mapping[str, Any], node: int = 0, nodes: int = 1) -> Share:
    """The share of node `node` of `nodes`; raises `ConfigError` where the run cannot be shared out so."""
    trainers, workers = config["trainer"]["processes"], config["rollout"]["workers"]
    asked = config["launch"]["trainer_nodes"]
    training = asked or nodes
    generating = nodes - asked
    if not 0 <= node < nodes:
        raise ConfigError(f"node {node} is none of {nodes} nodes, which are numbered from 0")
    if generating < 1:
        raise ConfigError(
            f"launch.trainer_nodes={asked} leaves none of {nodes} node(s) to the rollout workers: start the run on "
            f"more (launch/slurm.sh), or let every node do both (launch.trainer_nodes=0)"
        )
    if trainers % training:
        raise ConfigError(
            f"trainer.processes={trainers} cannot be shared out evenly among {training} nodes: make it a multiple, or "
            f"say with launch.trainer_nodes how many of the {nodes} nodes train"
        )
    if workers < generating:
        raise ConfigError(
            f"rollout.workers={workers} is fewer than the {generating} nodes that generate, of {nodes}: ask for fewer "
            f"nodes, or for more workers"
        )
    return Share(
        controller=node == 0,
        services=_part(config["rewards"]["services"], node, nodes),
        trainers=_part(trainers, node, training),
        workers=_part(workers, node - asked, generating),
    )


def _part(count: int, place: int, parts: int) -> range:
    """Which of `count` things are at `place` of `parts`: none at another place, one more at the first few."""
    if not 0 <= place < parts:
        return range(0)
    return range(-(-count * place // parts), -(-count * (place + 1) // parts))


def check_nodes(config: Mapping[str, Any], nodes: int) -> None:
    """Raises `ConfigError` for settings with which the run cannot be shared out among so many nodes, or its roles would
    not find each other's data there. Nothing is known of 0 nodes."""
    if nodes:
        share_of(config, 0, nodes)
    if nodes < 2:
        return
    if config["trainer"]["weights_transport"] == "shm":
        raise ConfigError(
            f"trainer.weights_transport='shm' reaches one host only, and the run has {nodes} nodes: use 'tcp', or "
            f"'disk' where the run's folder is on a fast shared disk"
        )
    for key in ("controller", "rewards"):
        if is_loopback(config[key]["address"]):
            raise ConfigError(
                f"{key}.address={config[key]['address']!r} cannot be reached from other nodes: use tcp://0.0.0.0:*, or "
                f"tcp://INTERFACE:* (tcp://ib0:*) for one network of several"
            )
