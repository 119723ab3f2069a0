"""Settings of the launcher, which supervises what runs on one machine, or on one node of a cluster."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    restarts: int = 6  # times in a row that a rollout worker, a server or the launcher's guardian is started again
    trainer_restarts: int = 1  # the same for the trainer: it goes on from its last checkpoint, or begins again
    stop_grace: float = 60.0  # seconds that roles get to save and end before they are killed; the trainer 4/5 of it
    announce_limit: float = 90.0  # seconds without a sign that the controller or a reward service is starting
    rollout_gpus: int = 0  # GPUs per rollout worker, the trainer gets the others of its node; 0: all processes see all
    trainer_nodes: int = 0  # on a cluster: the first so many nodes train, the others generate; 0: each does both
    rollout_nice: int = 0  # niceness of rollout workers: above 0, the trainer comes first where cores are short
    compile_cache: str = ""  # folder of compiled JAX programs, kept between runs; empty: none
    env: dict = dataclasses.field(default_factory=dict)  # environment of all roles
    rollout_env: dict = dataclasses.field(default_factory=dict)  # of rollout workers only
    trainer_env: dict = dataclasses.field(default_factory=dict)  # of trainer processes only
