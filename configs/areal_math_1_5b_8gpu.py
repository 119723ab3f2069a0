"""AReaL's small-scale table: R1-Distill-Qwen-1.5B with 8k context on 8 GPUs (arXiv 2505.24298, Table 7).

Command:   python -m areal_jax.launch --config=configs/areal_math_1_5b_8gpu.py --workdir=runs/math-8gpu \\
             --config.model=PATH/DeepSeek-R1-Distill-Qwen-1.5B --config.data.train=PATH/deepscaler.json
Hardware:  one node of 8 GPUs with 80 GB: 6 for generation, 2 for training
Expect:    at staleness 4 the paper reports 34.1 on AIME 2024, 86.9 on MATH500 and 49.0k tokens/s; synchronous
           (--config.controller.max_staleness=0) 31.7, 86.7 and 27.1k
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("areal_math_1_5b.py")))["get_config"]()
    c.name = "math 1.5B on 8 GPUs"
    c.controller.batch_size = 64
    c.controller.max_staleness = 4
    c.rewards.services = 1
    c.rollout.workers = 6
    c.rollout.max_length = 9216
    c.rollout.max_new_tokens = 8192
    c.trainer.processes = 1
    c.trainer.row_length = 16_384
    c.trainer.rows = 4
    return c
