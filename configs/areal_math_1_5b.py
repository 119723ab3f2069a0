"""AReaL's paper, mathematics with R1-Distill-Qwen-1.5B (arXiv 2505.24298, Tables 1 and 3).

Command:   sbatch --nodes=16 --gpus-per-node=8 launch/slurm.sh configs/areal_math_1_5b.py runs/math-1.5b (docs/slurm.md)
Hardware:  16 nodes of 8 GPUs with 80 GB; four nodes train, the others generate
Data:      DeepScaleR's training set and AIME 2024, as JSONL or Parquet
Expect:    the paper reports 42.2 on AIME 2024 (base 29.3) after 250 steps in 14.8 hours, and 42.0 in 41.0 hours for its
           own synchronous mode (--config.controller.max_staleness=0)
"""

from areal_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "math 1.5B"
    c.model = "models/DeepSeek-R1-Distill-Qwen-1.5B"

    c.data.train = "data/deepscaler.json"
    c.data.eval = "data/aime24.jsonl"
    c.data.format = "math"
    c.data.max_prompt_tokens = 1024
    c.data.too_long = "skip"

    c.controller.batch_size = 512
    c.controller.group_size = 16
    c.controller.max_staleness = 8
    c.controller.eval_samples_per_prompt = 32
    c.controller.progress_limit = 7200.0

    c.rewards.services = 4
    c.rewards.processes = 16
    c.rewards.offset = -0.5  # +5 for a right answer, -5 for a wrong one
    c.rewards.scale = 10.0

    c.rollout.engine = "vllm"
    c.rollout.workers = 96
    c.rollout.slots = 256
    c.rollout.max_length = 28_672
    c.rollout.max_new_tokens = 27_648
    c.rollout.eval_temperature = 1.0
    c.rollout.dtype = "bfloat16"
    c.launch.rollout_gpus = 1
    c.launch.trainer_nodes = 4

    c.trainer.steps = 250
    c.trainer.minibatches = 4
    c.trainer.objective_args = {"clip_low": 0.2, "clip_high": 0.2, "weight_cap": 5.0}  # the cap is the recipes'
    c.trainer.advantage = "reinforce_plus_plus"  # returns normalised over the whole batch, no critic
    c.trainer.proximal = "recompute"
    c.trainer.row_length = 32_768
    c.trainer.rows = 32  # one row per GPU
    c.trainer.max_segments = 32  # sequences in a row; flash attention pays for those that could be there
    c.trainer.processes = 32
    c.trainer.learning_rate = 2e-5
    c.trainer.warmup_steps = 1
    c.trainer.weight_decay = 0.05
    c.trainer.beta1, c.trainer.beta2, c.trainer.epsilon = 0.9, 0.95, 1e-5
    c.trainer.compute_dtype = "bfloat16"
    c.trainer.publish_dtype = "bfloat16"
    c.trainer.weights_transport = "disk"
    c.trainer.remat = "attention"
    c.trainer.batch_timeout = 7200.0
    c.trainer.eval_every = 25
    c.trainer.checkpoint_every = 10
    return c
