"""GSM8K with Qwen2.5-1.5B-Instruct: AReaL's flagship example (its examples/math/gsm8k_grpo.yaml).

Command:   python -m areal_jax.launch --config=configs/gsm8k_qwen2_5_1_5b.py --workdir=runs/gsm8k \\
             --config.model=PATH/Qwen2.5-1.5B-Instruct \\
             --config.data.train=PATH/train.jsonl --config.data.eval=PATH/test.jsonl
Hardware:  8 GPUs of 80 GB: 4 for generation, 4 for training
Expect:    AReaL reports 79.6 % on the test set, in about 35 minutes on 8 H800 (group size 4, staleness 2)
"""

from areal_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "gsm8k, Qwen2.5-1.5B"
    c.model = "models/Qwen2.5-1.5B-Instruct"

    c.data.train = "data/gsm8k_train.jsonl"
    c.data.eval = "data/gsm8k_test.jsonl"
    c.data.eval_limit = 0
    c.data.format = "gsm8k"
    c.data.prompt_suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."

    c.controller.batch_size = 256
    c.controller.group_size = 4
    c.controller.max_staleness = 2
    c.controller.max_concurrent = 256
    c.controller.epochs = 10

    c.rewards.processes = 16
    c.rewards.offset = -0.5
    c.rewards.scale = 10.0

    c.rollout.engine = "vllm"
    c.rollout.workers = 4
    c.rollout.slots = 256
    c.rollout.max_length = 2048
    c.rollout.max_new_tokens = 1024
    c.rollout.dtype = "bfloat16"
    c.launch.rollout_gpus = 1

    c.trainer.steps = 290  # ten epochs of 7,473 problems
    c.trainer.objective_args = {"clip_low": 0.4, "clip_high": 0.4, "weight_cap": 5.0}
    c.trainer.proximal = "recompute"
    c.trainer.row_length = 2560
    c.trainer.rows = 16  # 10,240 tokens per GPU and micro-batch
    c.trainer.max_segments = 16  # sequences in a row; flash attention pays for those that could be there
    c.trainer.learning_rate = 1.7e-5
    c.trainer.weight_decay = 0.017
    c.trainer.beta1, c.trainer.beta2, c.trainer.epsilon = 0.9, 0.999, 1e-8
    c.trainer.compute_dtype = "bfloat16"
    c.trainer.publish_dtype = "bfloat16"
    c.trainer.remat = "attention_qkv"
    c.trainer.eval_every = 29
    c.trainer.checkpoint_every = 29
    return c
