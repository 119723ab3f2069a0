"""Everything that can be known to be wrong with a run before any process starts, each as one line: `ConfigError`.

Nothing here touches an accelerator or allocates a parameter: the checks read the config, the heads of files, the data
set, and the tables of names that the roles themselves use.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from areal_jax.config import ConfigError, one_line, resolve, section
from areal_jax.data.formats import BadRecord
from areal_jax.data.prompts import load_prompts, load_tokenizer
from areal_jax.data.readers import DataError, Dataset
from areal_jax.launch.fit import check_memory, gpu_memory
from areal_jax.launch.installed import check_installed
from areal_jax.launch.nodes import check_nodes
from areal_jax.rewards.config import RewardsConfig
from areal_jax.transport.endpoints import split_address
from areal_jax.transport.errors import TransportError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_CHOICES = {
    "controller.over_age": ("drop", "wait"),
    "rollout.engine": ("jax", "vllm"),
    "rollout.exact": ("sync", "always", "never"),
    "rollout.kv_policy": ("recompute", "keep"),
    "rollout.dtype": ("float32", "bfloat16", "float16"),
    "rewards.on_error": ("drop", "stop"),
    "trainer.guard": ("skip", "stop"),
    "trainer.packing": ("dynamic", "fixed"),
    "trainer.attention": ("auto", "xla", "cudnn"),
    "trainer.remat": ("none", "full", "attention", "attention_qkv", "attention_mlp"),
    "trainer.layers": ("auto", "loop", "unrolled"),
    "trainer.schedule": ("constant", "linear", "cosine"),
    "trainer.param_dtype": ("float32", "bfloat16"),
    "trainer.compute_dtype": ("float32", "bfloat16"),
    "trainer.publish_dtype": ("float32", "bfloat16"),
    "trainer.weights_transport": ("shm", "tcp", "disk"),
    "data.template": ("auto", "chat", "none"),
    "data.too_long": ("error", "skip"),
    "data.bad_record": ("error", "skip"),
    "metrics.view": ("auto", "full", "lines", "none"),
}
_AT_LEAST = {
    1: (
        "controller.batch_size", "controller.group_size", "controller.max_attempts",
        "controller.eval_samples_per_prompt", "rollout.workers", "rollout.slots", "rollout.max_new_tokens",
        "rollout.steps_per_dispatch", "rewards.services", "rewards.processes", "rewards.max_pending", "trainer.steps",
        "trainer.minibatches", "trainer.row_length", "trainer.rows", "trainer.fixed_sequences", "trainer.processes",
        "trainer.keep_checkpoints",
    ),
    0: (
        "controller.max_staleness", "controller.max_concurrent", "controller.epochs", "rollout.min_new_tokens",
        "rollout.temperature", "rollout.eval_temperature", "rollout.top_k", "rewards.overlong_max",
        "rewards.overlong_buffer", "trainer.warmup_steps", "trainer.weight_decay", "trainer.max_grad_norm",
        "trainer.checkpoint_every", "trainer.eval_every", "trainer.lora_rank", "trainer.kl_coef", "data.eval_limit",
        "data.max_prompt_tokens", "launch.restarts", "launch.trainer_restarts", "launch.rollout_gpus",
        "launch.trainer_nodes", "trainer.grad_norm_limit", "trainer.ratio_limit", "trainer.mismatch_limit",
        "trainer.equal_rewards_limit", "trainer.max_segments", "trainer.beta1", "trainer.beta2", "trainer.seed",
    ),
}  # fmt: skip
_ABOVE_0 = (
    "controller.heartbeat_seconds", "controller.heartbeat_limit", "controller.progress_limit", "rollout.top_p",
    "rollout.weights_timeout", "rewards.timeout", "trainer.learning_rate", "trainer.batch_timeout",
    "trainer.epsilon", "launch.stop_grace", "launch.announce_limit",
    "controller.disk_limit", "metrics.refresh_seconds",
)  # fmt: skip
_BELOW_1 = ("trainer.beta1", "trainer.beta2")


def validate(
    config: Mapping[str, Any], tell: Callable[[str], None] = lambda line: None, *, here: bool = True, nodes: int = 1
) -> dict[str, Any]:
    """The resolved config of a run that can start, or `ConfigError` with the first thing that is wrong with it.

    `tell` is given what is not wrong, but should be known: what of the data is left out. With `here` the roles will
    start on this machine, and what they need must be installed on it. `nodes`: of a cluster; 0: not known.
    """
    resolved = resolve(config)
    check_settings(resolved)
    check_nodes(resolved, nodes)
    check_addresses(resolved)
    check_rewards(resolved)
    check_model(resolved)
    check_memory(resolved, gpu_memory(), nodes)
    check_data(resolved, tell)
    if here:
        check_installed(resolved)
    return resolved


# -- settings alone ----------------------------------------------------------------------------------------------------


def check_settings(config: Mapping[str, Any]) -> None:
    """Ranges, names and combinations; looks at nothing but `config` (as from `resolve`)."""
    check_values(config)
    _check_lengths(config["rollout"], config["trainer"], config["controller"])
    _check_data_settings(config)
    _check_objective(config)
    _check_mesh(config["trainer"])


def check_values(config: Mapping[str, Any]) -> None:
    """What `check_settings` asks of an evaluation, too: that has no trainer, and lengths of its own."""
    for key, choices in _CHOICES.items():
        if _get(config, key) not in choices:
            raise ConfigError(f"{key}={_get(config, key)!r} is unknown; it must be one of {', '.join(choices)}")
    for least, keys in _AT_LEAST.items():
        for key in keys:
            if not _get(config, key) >= least:
                raise ConfigError(f"{key}={_get(config, key)!r} must be at least {least}")
    for key in _ABOVE_0:
        if not _get(config, key) > 0:
            raise ConfigError(f"{key}={_get(config, key)!r} must be greater than 0")
    for key in _BELOW_1:
        if not _get(config, key) < 1:
            raise ConfigError(f"{key}={_get(config, key)!r} must be less than 1")
    if not -(2**63) <= config["seed"] < 2**63:
        raise ConfigError(f"seed={config['seed']} must be a number of 64 bits")
    samples = config["controller"]["eval_samples_per_prompt"]
    if samples > 1 and config["rollout"]["eval_temperature"] == 0:
        raise ConfigError(
            f"controller.eval_samples_per_prompt={samples} with rollout.eval_temperature=0 (greedy) asks for the same "
            f"answer {samples} times; set a temperature, or 1 sample"
        )
    _check_rewards_settings(config["rewards"])


def _check_lengths(rollout: dict, trainer: dict, controller: dict) -> None:
    if rollout["top_p"] > 1:
        raise ConfigError(f"rollout.top_p={rollout['top_p']} must be at most 1")
    if rollout["temperature"] == 0:
        raise ConfigError("rollout.temperature=0 (greedy) leaves nothing to explore; use 1.0")
    if rollout["max_new_tokens"] >= rollout["max_length"]:
        raise ConfigError(
            f"rollout.max_new_tokens={rollout['max_new_tokens']} leaves no room for a prompt in "
            f"rollout.max_length={rollout['max_length']}"
        )
    if rollout["min_new_tokens"] > rollout["max_new_tokens"]:
        raise ConfigError("rollout.min_new_tokens is greater than rollout.max_new_tokens")
    if rollout["max_length"] > trainer["row_length"]:
        raise ConfigError(
            f"rollout.max_length={rollout['max_length']} is longer than trainer.row_length={trainer['row_length']}: "
            f"a sequence must fit into one packed row"
        )
    concurrent = controller["max_concurrent"]
    if concurrent and controller["max_staleness"] == 0 and concurrent < controller["batch_size"]:
        raise ConfigError(
            f"controller.max_concurrent={concurrent} groups is less than controller.batch_size="
            f"{controller['batch_size']}, which max_staleness=0 generates at once; use 0 (no limit)"
        )
    beat, limit = controller["heartbeat_seconds"], controller["heartbeat_limit"]
    if limit <= beat:
        raise ConfigError(
            f"controller.heartbeat_limit={limit:g} must be longer than controller.heartbeat_seconds={beat:g}: every "
            f"process would be taken for dead between two heartbeats"
        )
    if controller["group_size"] == 1 and trainer["advantage"] != "reinforce_plus_plus":
        raise ConfigError(
            f"controller.group_size=1 makes every group-relative advantage 0, or the same for all, and "
            f"trainer.advantage={trainer['advantage']!r} is one; use 2 or more, or 'reinforce_plus_plus'"
        )
    if controller["group_size"] == 1 and controller["dynamic_filter"]:
        raise ConfigError("controller.dynamic_filter leaves out every group of one sample; use group_size 2 or more")
    if trainer["minibatches"] > controller["batch_size"]:
        raise ConfigError(
            f"trainer.minibatches={trainer['minibatches']} is more than the controller.batch_size="
            f"{controller['batch_size']} groups of a batch, which stay whole"
        )
    if trainer["checkpoint_every"] > trainer["steps"]:
        raise ConfigError("trainer.checkpoint_every is greater than trainer.steps; use 0 for the end only")


def _check_data_settings(config: Mapping[str, Any]) -> None:
    longest, room = config["data"]["max_prompt_tokens"], config["rollout"]["max_length"]
    if longest >= room:
        raise ConfigError(
            f"data.max_prompt_tokens={longest} leaves no room for an answer in rollout.max_length={room}: make one "
            f"smaller or the other greater"
        )
    every = config["trainer"]["eval_every"]
    if every and not config["data"]["eval"]:
        raise ConfigError(f"trainer.eval_every={every} evaluates nothing without data.eval: set that, or eval_every=0")


def _check_rewards_settings(rewards: dict) -> None:
    count = len(rewards["verifiers"])
    if not count:
        raise ConfigError("rewards.verifiers is empty: name a function, e.g. 'areal_jax.rewards:verify_math'")
    for key in ("weights", "verifier_args"):
        if len(rewards[key]) != count:
            raise ConfigError(f"rewards.{key} has {len(rewards[key])} entries for {count} verifiers; give one each")
    if not all(isinstance(weight, (int, float)) for weight in rewards["weights"]):
        raise ConfigError(f"rewards.weights={rewards['weights']!r} must be numbers, one for each verifier")
    if not all(isinstance(own, dict) for own in rewards["verifier_args"]):
        raise ConfigError(f"rewards.verifier_args={rewards['verifier_args']!r} must be dicts, one for each verifier")
    if rewards["overlong_buffer"] > rewards["overlong_max"]:
        raise ConfigError("rewards.overlong_buffer is longer than rewards.overlong_max")


def _check_objective(config: Mapping[str, Any]) -> None:
    from areal_jax.trainer import advantages, objectives

    trainer = config["trainer"]
    names = ("correction", "correction_args", "aggregate", "kl_coef", "entropy_coef", "proximal", "minibatches")
    try:
        objectives.make(trainer["objective"], trainer["objective_args"], **{name: trainer[name] for name in names})
        advantages.check(trainer["advantage"], trainer["advantage_args"])
    except objectives.ObjectiveError as error:
        raise ConfigError(str(error)) from None


def _check_mesh(trainer: dict) -> None:
    axes = {name: trainer[name] for name in ("data_parallel", "fsdp", "tensor", "expert")}
    for name, size in axes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"trainer.{name}={size} must be a number of devices, or -1 for whatever is left")
    if sum(size == -1 for size in axes.values()) > 1:
        raise ConfigError("only one of trainer.data_parallel, fsdp, tensor, expert can be -1 (whatever is left)")
    rows = "fixed_sequences" if trainer["packing"] == "fixed" else "rows"
    shards = math.prod(axes[name] for name in ("data_parallel", "fsdp") if axes[name] != -1)
    if trainer[rows] % shards:
        raise ConfigError(
            f"trainer.{rows}={trainer[rows]} must be a multiple of {shards} (trainer.data_parallel="
            f"{axes['data_parallel']} x trainer.fsdp={axes['fsdp']}), over which the rows are split"
        )


# -- what the settings point to ----------------------------------------------------------------------------------------


def check_addresses(config: Mapping[str, Any]) -> None:
    """Every address can be bound now."""
    taken: dict[str, str] = {}
    for key in ("controller.address", "rewards.address"):
        address = _get(config, key)
        try:
            host, port = split_address(address)
        except TransportError as error:
            raise ConfigError(f"{key}: {error}") from None
        if port == "*":
            continue
        if address in taken or (key == "rewards.address" and config["rewards"]["services"] > 1):
            raise ConfigError(f"{key}={address!r} is for one process only; use tcp://{host}:* for a free port each")
        taken[address] = key
        _check_port(key, host, int(port))


def _check_port(key: str, host: str, port: int) -> None:
    where = "" if host == "*" else host.strip("[]")
    try:
        family = socket.getaddrinfo(where or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((where, port))
    except OSError as error:
        raise ConfigError(f"{key}: port {port} of {host}: {error.strerror}; use another, or '*'") from None


def check_rewards(config: Mapping[str, Any]) -> None:
    """Verifiers, workflow and engine take the arguments that the settings have, and the verifiers go together."""
    from areal_jax.rewards.loading import check_arguments, load_verifier
    from areal_jax.rewards.outcome import VerifierError
    from areal_jax.rewards.service import recipe_of
    from areal_jax.rollout.factory import check_engine_args
    from areal_jax.rollout.workflows import check_workflow

    for path, arguments in zip(config["rewards"]["verifiers"], config["rewards"]["verifier_args"]):
        try:
            check_arguments(load_verifier(path), arguments)
        except VerifierError as error:
            raise ConfigError(f"rewards.verifiers: {one_line(error)}") from None
    try:
        recipe_of(section(RewardsConfig, config["rewards"]))
    except ValueError as error:
        raise ConfigError(f"rewards: {one_line(error)}") from None
    rollout = config["rollout"]
    try:
        check_workflow(rollout["workflow"], rollout["workflow_args"])
        check_engine_args(rollout["engine"], rollout["engine_args"], rollout["python"])
    except ValueError as error:
        raise ConfigError(one_line(error)) from None


def check_model(config: Mapping[str, Any]) -> None:
    """The checkpoint folder is whole, its architecture is known, and its context is long enough."""
    from areal_jax.models.config import ModelConfig, ModelError

    folder = config["model"]
    if not folder:
        raise ConfigError("no model given: set --config.model to the folder of a Hugging Face checkpoint")
    if not os.path.isdir(folder):
        raise ConfigError(f"the model folder '{folder}' does not exist")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ConfigError(f"the model folder '{folder}' has no config.json; give a Hugging Face checkpoint folder")
    if not any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        raise ConfigError(f"the model folder '{folder}' has no tokenizer (tokenizer.json); copy it from the base model")
    try:
        _check_weights(folder)
        model = ModelConfig.from_hf(folder)
    except ModelError as error:
        raise ConfigError(f"model '{folder}': {one_line(error)}") from None
    if config["rollout"]["max_length"] > model.max_positions:
        raise ConfigError(
            f"rollout.max_length={config['rollout']['max_length']} is longer than the model's context of "
            f"{model.max_positions} tokens"
        )
    if config["trainer"]["expert"] > 1 and not model.num_experts:
        raise ConfigError(
            f"trainer.expert={config['trainer']['expert']} splits nothing: the model has no experts; use trainer.fsdp"
        )
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in '{folder}' names no end-of-sequence token: no answer would ever end")
    if len(tokenizer) > model.vocab_size:
        raise ConfigError(
            f"the tokenizer in '{folder}' has {len(tokenizer)} tokens, the model {model.vocab_size}: they do not match"
        )


def _check_weights(folder: str) -> None:
    """The files of weights are all there and whole, as their heads tell: a download may have broken off."""
    from safetensors import SafetensorError, safe_open

    from areal_jax.models.files import weight_files

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"'{path}' is no whole file of weights ({one_line(error)}): did its download break off, or is it a "
                f"pointer of Git LFS?"
            ) from None


def check_data(config: Mapping[str, Any], tell: Callable[[str], None] = lambda line: None) -> None:
    """Both data sets can be read and judged, and every prompt fits the context (or is to be skipped, which is told)."""
    from areal_jax.rewards.loading import ours, record_check

    batch = config["controller"]["batch_size"]
    tokenizer, check = load_tokenizer(config["model"]), record_check(config)
    for key in ("train", "eval"):
        if key == "eval" and not config["data"]["eval"]:
            continue
        try:
            kept = load_prompts(key, config, tokenizer, check=check, tell=tell)
        except DataError as error:
            raise ConfigError(str(error)) from None
        if not ours(config):
            _tell_of_unjudgeable(key, kept, config, tell)
        if key == "train" and config["controller"]["epochs"] and len(kept) < batch:
            raise ConfigError(
                f"data.train: {len(kept)} prompts are fewer than one batch (controller.batch_size={batch})"
            )


def _tell_of_unjudgeable(key: str, dataset: Dataset, config: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """With a workflow of the user's own it is no error if the verifiers cannot judge by a record, but worth a word."""
    from areal_jax.rewards.loading import record_check

    check, found = record_check(config, any_workflow=True), []
    for index, record in enumerate(dataset):
        try:
            check(record)
        except BadRecord as error:
            found.append(f"{dataset.place(index)}: {error}")
    if found:
        tell(
            f"data.{key}: the verifiers cannot judge by {len(found):,} of {len(dataset):,} records, unless "
            f"{config['rollout']['workflow']} gives them others; the first: {one_line(found[0])}"
        )


def _get(config: Mapping[str, Any], key: str) -> Any:
    name, field = key.split(".")
    return config[name][field]
