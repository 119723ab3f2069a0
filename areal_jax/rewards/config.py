"""Settings of the reward service."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    services: int = 1  # service processes, on all nodes together
    processes: int = 1  # verifier processes per service
    verifiers: tuple = ("areal_jax.rewards:verify_math",)  # import paths
    weights: tuple = (1.0,)
    verifier_args: tuple = ({},)  # keyword arguments for each verifier
    scale: float = 1.0  # trained reward = (sum of weighted scores + offset) * scale; accuracy is reported unscaled
    offset: float = 0.0
    timeout: float = 15.0  # seconds per answer
    on_error: str = "drop"  # a verifier that fails: "drop" the sample (counted, named) or "stop" the run
    overlong_max: int = 0  # DAPO overlong penalty: longest answer in tokens; 0: none
    overlong_buffer: int = 0  # tokens before that, over which the penalty grows
    overlong_factor: float = 1.0  # the penalty's weight, in units of the verifiers' scores (before offset and scale)
    max_pending: int = 4096  # questions that a service holds at once; others wait in the sockets
    address: str = "tcp://127.0.0.1:*"
