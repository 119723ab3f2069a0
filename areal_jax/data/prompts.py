"""From data to the tokens that the model is asked to continue: which records a run uses, and how each is rendered."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from areal_jax.data.config import DataConfig
from areal_jax.data.formats import Record
from areal_jax.data.readers import DataError, Dataset, load_dataset

MANY = 200_000  # prompts whose lengths take more than a few seconds to measure
_ADDED = 8  # tokens that a tokenizer may put around a text


def render_prompt(record: Record, tokenizer: Any, config: DataConfig) -> list[int]:
    """Token ids of `record`'s prompt, with the checkpoint's chat template where `config.template` says so.

    A record has "prompt" (text) or "messages" (chat turns). `config.prompt_suffix` is added to the text (of the last
    turn), `config.system_prompt` goes before everything. Raises ValueError where the template is missing.
    """
    if use_chat(tokenizer, config, record):
        return [
            int(token)
            for token in tokenizer.apply_chat_template(
                chat_messages(record, config), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        ]
    return [int(token) for token in tokenizer.encode(_plain_text(record, config))]


def _plain_text(record: Record, config: DataConfig) -> str:
    text = record["prompt"] + config.prompt_suffix
    return config.system_prompt + "\n\n" + text if config.system_prompt else text


class Prompts:
    """`render_prompt` as int32 arrays, remembering the last few records: a group's samples have one prompt."""

    def __init__(self, tokenizer: Any, config: DataConfig, kept: int = 16):
        self._tokenizer, self._config = tokenizer, config
        self._last: deque[tuple[Record, np.ndarray]] = deque(maxlen=kept)

    def tokens(self, record: Record) -> np.ndarray:
        """Read-only int32 tokens of `record`'s prompt; raises what `render_prompt` raises."""
        for known, tokens in self._last:
            if known == record:
                return tokens
        tokens = np.asarray(render_prompt(record, self._tokenizer, self._config), np.int32)
        tokens.flags.writeable = False
        self._last.appendleft((copy.deepcopy(record), tokens))  # a workflow may change its record
        return tokens


def load_tokenizer(folder: str) -> Any:
    """The checkpoint's tokenizer, from the folder alone; raises `DataError`."""
    from transformers import AutoTokenizer  # takes seconds: not before it is needed

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise DataError(f"the tokenizer in '{folder}' cannot be loaded: {' '.join(str(error).split())}") from None


def load_prompts(
    key: str,
    config: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    check: Callable[[Record], None] = lambda record: None,
    tell: Callable[[str], None] = lambda line: None,
    going_on: Callable[[], None] = lambda: None,
) -> Dataset:
    """The records of `data.<key>` ("train" or "eval") that a run with this resolved config uses.

    What `check` refuses (see `load_dataset`) and prompts that leave no room for an answer are an error or left out, as
    the settings say; without `tokenizer` no prompt is measured. Of "eval" only the first `data.eval_limit` are used.
    `tell` is given what is no error, but should be known; `going_on()` is called now and then, as this may take
    minutes. Raises `DataError`.
    """
    data = DataConfig(**config["data"])
    try:
        dataset = load_dataset(getattr(data, key), data, check)
        going_on()
        if tokenizer is not None:
            if len(dataset) > MANY:
                tell(f"data.{key}: measuring {len(dataset):,} prompts, which takes a while")
            dataset = fitting(dataset, tokenizer, data, prompt_limit(config), going_on)
    except ValueError as error:
        raise DataError(f"data.{key}: {' '.join(str(error).split())}") from None
    if dataset.left_out:
        tell(f"data.{key}: {' '.join(dataset.left_out.split())}")
    limit = data.eval_limit if key == "eval" else 0
    if not 0 < limit < len(dataset):
        return dataset
    tell(f"data.eval: the first {limit:,} of {len(dataset):,} problems are used (data.eval_limit; 0: all)")
    return dataset.first(limit)


def fitting(
    dataset: Dataset, tokenizer: Any, config: DataConfig, limit: int, going_on: Callable[[], None] = lambda: None
) -> Dataset:
    """`dataset` without the prompts of more than `limit` tokens; what is left out is counted in `skipped`.

    Raises `DataError` if there are such and `config.too_long` is "error", or if none is left.
    """
    kept, too_long = [], []
    for index in range(len(dataset)):
        if index % 256 == 0:
            going_on()
        record = dataset[index]
        short = _surely_fits(record, tokenizer, config, limit)
        if short or (length := len(render_prompt(record, tokenizer, config))) <= limit:
            kept.append(index)
        else:
            too_long.append(f"{dataset.place(index)}: its prompt has {length} tokens, {limit} fit")
    room = "(rollout.max_length - rollout.max_new_tokens, data.max_prompt_tokens)"
    if too_long and config.too_long == "error":
        raise DataError(
            f"{len(too_long)} of {len(dataset)} prompts are too long; the first: {too_long[0]} {room}; "
            f"data.too_long='skip' leaves them out"
        )
    if not kept:
        raise DataError(f"all {len(dataset)} prompts of '{dataset.name}' are longer than {limit} tokens {room}")
    return dataset.only(kept, too_long)


def _surely_fits(record: Record, tokenizer: Any, config: DataConfig, limit: int) -> bool:
    """Whether the prompt is so short that it need not be turned into tokens to know that it fits.

    A token of an ASCII text stands for a character or more, but for the few that a tokenizer puts around it.
    """
    if use_chat(tokenizer, config, record):
        messages = chat_messages(record, config)
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = _plain_text(record, config)
    return len(text) + _ADDED <= limit and text.isascii()


def prompt_limit(config: Mapping[str, Any]) -> int:
    """The longest prompt, in tokens: one that leaves room for the longest answer, or as the data's settings say.

    There is always room for one new token.
    """
    rollout = config["rollout"]
    asked = config["data"]["max_prompt_tokens"] or rollout["max_length"] - rollout["max_new_tokens"]
    return min(asked, rollout["max_length"] - 1)


def chat_messages(record: Record, config: DataConfig) -> list[dict[str, str]]:
    """`record` as chat turns, with the system prompt and the suffix of `config`."""
    turns = [dict(turn) for turn in record.get("messages") or [{"role": "user", "content": record["prompt"]}]]
    turns[-1]["content"] += config.prompt_suffix
    if config.system_prompt and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": config.system_prompt})
    return turns


def use_chat(tokenizer: Any, config: DataConfig, record: Record) -> bool:
    """Whether the record is rendered through the chat template; raises ValueError when it must be but cannot."""
    if config.template not in ("auto", "chat", "none"):
        raise ValueError(f"data.template must be 'auto', 'chat' or 'none', not '{config.template}'")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    wants = config.template == "chat" or "messages" in record or (config.template == "auto" and has_template)
    if wants and not has_template:
        why = "data.template='chat'" if config.template == "chat" else "a record with 'messages'"
        raise ValueError(f"{why} needs a chat template, and the checkpoint's tokenizer has none")
    return wants
