"""Settings of the controller."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    batch_size: int = 32  # prompts (groups) per training step
    group_size: int = 8  # samples per prompt
    max_staleness: int = 4  # η; 0 is synchronous RL
    over_age: str = "drop"  # what happens to a sample at the bound: "drop" (its prompt is queued again) or "wait"
    max_concurrent: int = 0  # groups in flight at most; 0: as many as the staleness gate allows
    dynamic_filter: bool = False  # leave out groups whose rewards are all equal
    epochs: int = 0  # passes over the data; 0: until the trainer has its steps
    shuffle: bool = True
    max_attempts: int = 3  # tries of one sample before its prompt is quarantined
    heartbeat_seconds: float = 1.0  # between two signs of life of every process
    heartbeat_limit: float = 30.0  # silent so long: taken for dead; a worker that is silent twice as long is replaced
    progress_limit: float = 600.0  # no sample finished and no batch taken for so long: end with a diagnosis
    disk_limit: float = 600.0  # seconds to wait for room when the journal or the trainer's record cannot be written
    address: str = "tcp://127.0.0.1:*"  # where to listen; "*": any free port, written to the run's folder
    eval_samples_per_prompt: int = 1  # answers to each problem of an evaluation
