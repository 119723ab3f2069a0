"""Settings of the prompt data."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = ""  # a file (JSONL, JSON, Parquet), a folder's split ("DIR:train"), or "arithmetic:count=4096,seed=0"
    eval: str = ""  # the same; empty: no evaluation
    eval_limit: int = 256  # problems of the evaluation set used in a run; 0: all
    format: str = "auto"  # "auto", "gsm8k", "prompt_answer", "math", "code", ...
    fields: dict = dataclasses.field(default_factory=dict)  # our name: its place in a record ({"answer": "a.truth"})
    template: str = "auto"  # "chat", "none", or "auto": the checkpoint's chat template where it has one
    system_prompt: str = ""
    prompt_suffix: str = ""  # behind every prompt's text
    max_prompt_tokens: int = 0  # 0: rollout.max_length - rollout.max_new_tokens; less than rollout.max_length
    too_long: str = "error"  # a prompt longer than that: "error" or "skip" (counted)
    bad_record: str = "error"  # malformed, or no gold answer to judge by: "error" (names the line) or "skip" (counted)
