"""Settings of the local supervisor."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    restarts: int = 3  # times that one rollout worker, reward service or the controller is started again after dying
    trainer_restarts: int = 1  # the same for the trainer, which then goes on from its last checkpoint
    stop_grace: float = 60.0  # seconds that roles get to save and end before they are killed
    rollout_nice: int = 0  # niceness of rollout workers: above 0, the trainer comes first where cores are short
    env: dict = dataclasses.field(default_factory=dict)  # environment for all roles
    rollout_env: dict = dataclasses.field(default_factory=dict)  # for rollout workers only, e.g. CUDA_VISIBLE_DEVICES
    trainer_env: dict = dataclasses.field(default_factory=dict)  # for trainer processes only
