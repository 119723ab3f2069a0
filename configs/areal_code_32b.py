"""AReaL's paper, programs with R1-Distill-Qwen-32B (arXiv 2505.24298, Table 1).

Command:   sbatch --nodes=48 --gpus-per-node=8 launch/slurm.sh configs/areal_code_32b.py runs/code-32b (docs/slurm.md)
Hardware:  48 nodes of 8 GPUs with 80 GB; each engine uses two GPUs
Expect:    the paper reports 61.0 on LiveCodeBench (base 57.4) after 60 steps in 31.1 hours; synchronous: 61.2, 51.1 h
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("areal_code_14b.py")))["get_config"]()
    c.name = "code 32B"
    c.model = "models/DeepSeek-R1-Distill-Qwen-32B"
    c.launch.trainer_nodes = 12
    c.rollout.workers = 144
    c.rollout.engine_args = {"tensor_parallel_size": 2}
    c.launch.rollout_gpus = 2
    c.trainer.steps = 60
    c.trainer.processes = 96
    c.trainer.rows = 24
    c.trainer.tensor = 4
    return c
