"""Settings of a rollout worker."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    engine: str = "jax"  # "jax" (embedded) or "vllm"
    workers: int = 1  # processes, on all nodes together
    slots: int = 64  # sequences generated at once per worker
    max_length: int = 256  # prompt and new tokens together
    max_new_tokens: int = 128
    min_new_tokens: int = 0  # as top_p
    temperature: float = 1.0
    top_p: float = 1.0  # below 1 the trainer's log-probs are still of all tokens; importance weights make up for it
    top_k: int = 0  # 0: all; else as top_p
    eval_temperature: float = 0.0  # 0: greedy
    kv_policy: str = "recompute"  # on new weights: "recompute" caches (the paper) or "keep" them
    interruptible: bool = True  # False: finish running sequences before loading new weights
    rolling_updates: bool = True  # one worker, or an eighth of many, loads at a time: the fleet never stands still
    exact: str = "sync"  # embedded engine: bits do not depend on the schedule: "sync" (where η = 0), "always", "never"
    steps_per_dispatch: int = 8  # embedded engine: decode steps per dispatch
    workflow: str = "areal_jax.rollout.workflows:SingleTurn"  # import path
    workflow_args: dict = dataclasses.field(default_factory=dict)
    python: str = ""  # interpreter of the rollout workers; empty: the same as the launcher's
    dtype: str = "float32"  # compute and cache dtype of the engine
    engine_args: dict = dataclasses.field(default_factory=dict)  # passed through to vLLM by name
    weights_timeout: float = 120.0  # seconds to wait for a version's bytes

    @property
    def restricted(self) -> bool:
        """Whether only a part of the distribution is sampled from."""
        return self.top_p < 1 or self.top_k > 0 or self.min_new_tokens > 0
