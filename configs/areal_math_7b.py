"""AReaL's paper, mathematics with R1-Distill-Qwen-7B (arXiv 2505.24298, Table 1).

Command:   sbatch --nodes=24 --gpus-per-node=8 launch/slurm.sh configs/areal_math_7b.py runs/math-7b (docs/slurm.md)
Hardware:  24 nodes of 8 GPUs with 80 GB
Expect:    the paper reports 63.1 on AIME 2024 (base 54.3) after 250 steps in 25.4 hours; synchronous 63.0 in 57.7 hours
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("areal_math_1_5b.py")))["get_config"]()
    c.name = "math 7B"
    c.model = "models/DeepSeek-R1-Distill-Qwen-7B"
    c.launch.trainer_nodes = 6
    c.rollout.workers = 144
    c.trainer.processes = 48
    c.trainer.rows = 48
    return c
