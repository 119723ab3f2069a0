"""Settings of the trainer. No jax here: the launcher reads this too."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    steps: int = 100  # versions to make
    objective: str = "decoupled_ppo"  # any objective of the library, by name (areal_jax/trainer/objectives.py)
    objective_args: dict = dataclasses.field(default_factory=dict)  # its keyword arguments
    advantage: str = "group_relative"  # an estimator of the library, by name (areal_jax/trainer/advantages.py)
    advantage_args: dict = dataclasses.field(default_factory=dict)
    aggregate: str = "token_mean"  # of the tokens' losses; see docs/objectives.md
    correction: str = "none"  # extra engine-mismatch correction: "none", "tis", "icepop", ...
    correction_args: dict = dataclasses.field(default_factory=dict)
    kl_coef: float = 0.0  # penalty (k3) towards the checkpoint the run began with, aggregated as the loss is
    entropy_coef: float = 0.0  # bonus on the mean entropy of the tokens
    proximal: str = "recompute"  # "recompute", "loglinear" or "fused" (exact and free with one minibatch)
    minibatches: int = 1  # optimizer updates per training step
    packing: str = "dynamic"  # "dynamic" (tokens per micro-batch) or "fixed" (sequences per micro-batch)
    row_length: int = 512  # tokens per packed row
    rows: int = 8  # rows per micro-batch over all devices
    fixed_sequences: int = 32  # packing="fixed": sequences per micro-batch, one per row
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"  # "constant", "linear" or "cosine"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"  # "bfloat16" on GPUs
    publish_dtype: str = "float32"  # dtype of the weights that rollout workers get
    attention: str = "auto"  # "xla", "cudnn" or "auto"; see docs/models.md
    remat: str = "none"  # what the backward pass computes again; see docs/models.md
    layers: str = "auto"  # "loop", "unrolled" (a faster step, a longer compilation) or "auto"; see docs/models.md
    max_segments: int = 0  # sequences that a packed row may hold; 0: one for every 8 tokens, at most 64
    data_parallel: int = 1  # mesh sizes; -1 for one of them: whatever devices are left
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    lora_rank: int = 0  # of adapters, which then are all that is trained; 0: none
    processes: int = 1  # JAX processes
    seed: int = 1  # of how a batch's groups are dealt to minibatches
    checkpoint_every: int = 0  # steps; 0: only at the end and when told to stop
    keep_checkpoints: int = 2  # how many of the newest stay
    batch_timeout: float = 600.0  # seconds to wait for a batch before giving up with a diagnosis
    eval_every: int = 0  # steps; 0: only before and after
    guard: str = "skip"  # a bad step (below): "skip" its update and count it, or "stop" the run; its batch is saved
    grad_norm_limit: float = 0.0  # a larger gradient norm is bad; 0: only one that is not finite
    ratio_limit: float = 0.0  # a larger importance weight of any token is bad; 0: no limit
    mismatch_limit: float = 0.0  # a larger mean |Δ log-prob| of engine and trainer at lag 0 is bad; 0: only warned of
    equal_rewards_limit: int = 0  # bad: so many steps in a row without a group that could teach anything; 0: no limit
    weights_transport: str = "shm"  # "shm", "tcp" or "disk"
