"""The real GSM8K file on a laptop: real prompts and the real verifier, with the quick start's tiny network.

Command:   python -m areal_jax.launch --config=configs/gsm8k_tiny.py --workdir=runs/gsm8k-tiny \\
             --config.data.train=PATH/gsm8k_train.jsonl
Hardware:  2 CPU cores, no GPU
Data:      train.jsonl of github.com/openai/grade-school-math (question, and an answer ending in "#### n")
Expect:    no learning, the network knows nothing but small sums: this shows that data, verifier and metrics are real
"""

from pathlib import Path

from areal_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "gsm8k, tiny network"
    c.model = str(Path(__file__).resolve().parent / "toy")

    c.data.train = "data/gsm8k_train.jsonl"
    c.data.format = "gsm8k"
    c.data.too_long = "skip"  # the tokenizer has one token per byte: the longest tenth of the questions is left out

    c.controller.batch_size = 8
    c.controller.group_size = 4
    c.controller.max_staleness = 2

    c.rewards.verifier_args = ({"mode": "last_number"},)

    c.launch.compile_cache = "runs/.compiled"

    c.rollout.slots = 32
    c.rollout.max_length = 512
    c.rollout.max_new_tokens = 96

    c.trainer.steps = 10
    c.trainer.proximal = "fused"
    c.trainer.row_length = 512
    c.trainer.rows = 8
    c.trainer.learning_rate = 1e-4
    return c
