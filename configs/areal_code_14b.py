"""AReaL's paper, programs with R1-Distill-Qwen-14B (arXiv 2505.24298, Table 1).

Command:   sbatch --nodes=32 --gpus-per-node=8 launch/slurm.sh configs/areal_code_14b.py runs/code-14b (docs/slurm.md)
Hardware:  32 nodes of 8 GPUs with 80 GB
Data:      DeepCoder's training set; LiveCodeBench for evaluation
Expect:    the paper reports 58.1 on LiveCodeBench (base 53.4) after 80 steps in 21.9 hours; synchronous: 56.7, 48.8 h
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("areal_math_1_5b.py")))["get_config"]()
    c.name = "code 14B"
    c.model = "models/DeepSeek-R1-Distill-Qwen-14B"

    c.data.train = "data/deepcoder.jsonl"
    c.data.eval = "data/livecodebench.jsonl"
    c.data.format = "auto"

    c.controller.max_staleness = 4

    c.rewards.verifiers = ("areal_jax.rewards:verify_code",)
    c.rewards.services = 32
    c.rewards.timeout = 120.0

    c.launch.trainer_nodes = 8
    c.rollout.workers = 192
    c.trainer.steps = 80
    c.trainer.processes = 64
    c.trainer.rows = 32
    c.trainer.tensor = 2
    return c
