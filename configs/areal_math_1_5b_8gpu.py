"""AReaL's small-scale tables: R1-Distill-Qwen-1.5B with 8k context on 8 GPUs (arXiv 2505.24298, Tables 7 and 8).

Command:   python -m areal_jax.launch --config=configs/areal_math_1_5b_8gpu.py --workdir=runs/math-8gpu \\
             --config.model=PATH/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=PATH/deepscaler.json
           one row of the table:  --config.controller.max_staleness=0 (or 1, 2, 4, 8, 16)
           Table 8:               --config.trainer.advantage=leave_one_out
           MATH500 afterwards:    python -m areal_jax.eval --run=runs/math-8gpu --data=PATH/math500.jsonl --out=OUT
Hardware:  one node of 8 GPUs with 80 GB: 6 for generation, 2 for training
Expect:    what the paper reports, with 1,000 tokens/s that were trained on:

             max_staleness            0     1     2     4     8     16
             AIME 2024              31.7  32.6  32.4  34.1  29.9  32.8
             MATH500                86.7  86.4  86.6  86.9  86.1  86.3
             1,000 tokens/s         27.1  47.8  47.8  49.0  51.5  52.0
             AIME 2024, RLOO        32.4  32.9  34.1  32.9  31.5  32.7
             MATH500, RLOO          87.3  87.7  86.9  87.0  87.4  87.4
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("areal_math_1_5b.py")))["get_config"]()
    c.name = "math 1.5B on 8 GPUs"
    c.controller.batch_size = 64
    c.controller.max_staleness = 4
    c.rewards.services = 1
    c.launch.trainer_nodes = 0
    c.rollout.workers = 6
    c.rollout.max_length = 9216
    c.rollout.max_new_tokens = 8192
    c.trainer.processes = 1
    c.trainer.weights_transport = "shm"
    c.trainer.row_length = 16_384
    c.trainer.rows = 4
    c.trainer.max_segments = 16
    return c
