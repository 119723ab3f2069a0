"""A run's whole configuration, assembled from the dataclasses that the roles define; they are its single source.

A config file (`configs/*.py`) takes `default_config()` and changes it; the launcher writes the result to the run's
folder; each role's `__main__` reads it there and turns its own section back into a frozen dataclass. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from ml_collections import ConfigDict

from areal_jax.controller.config import ControllerConfig
from areal_jax.data.config import DataConfig
from areal_jax.disk import write_whole
from areal_jax.launch.config import LaunchConfig
from areal_jax.metrics.config import MetricsConfig
from areal_jax.rewards.config import RewardsConfig
from areal_jax.rollout.config import RolloutConfig
from areal_jax.trainer.config import TrainerConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one line that says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What stands above the sections."""

    name: str = "run"  # shown in the live view, and the run's name in Weights & Biases
    seed: int = 1  # of the data's order and of sampling
    model: str = ""  # path of a Hugging Face folder: config.json, safetensors, tokenizer


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "rollout": RolloutConfig,
    "rewards": RewardsConfig,
    "controller": ControllerConfig,
    "trainer": TrainerConfig,
    "metrics": MetricsConfig,
    "launch": LaunchConfig,
}


def default_config() -> ConfigDict:
    """Every setting with its default; unknown keys are refused when assigned."""
    config = ConfigDict(dataclasses.asdict(RunConfig()), convert_dict=True)
    for name, cls in SECTIONS.items():
        config[name] = ConfigDict(dataclasses.asdict(cls()))
    return config.lock()


def section(cls: type[T], mapping: Mapping[str, Any], name: str | None = None) -> T:
    """The frozen dataclass `cls` with the values of `mapping`; what `mapping` leaves out keeps its default.

    Raises `ConfigError` for an unknown key or a value of the wrong type, naming the key. `name` is how messages call
    the section (default: from the class's name). Whole numbers are taken where a float is wanted, lists for tuples.
    """
    name = cls.__name__.removesuffix("Config").lower() if name is None else name
    prefix = f"{name}." if name else ""
    hints = get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise unknown_key(str(key), hints, prefix)
    return cls(**{key: _convert(prefix + key, hints[key], value) for key, value in mapping.items()})


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (ConfigDict or nested dict) as a plain nested dict with every key present and every type checked.

    Raises `ConfigError` as `section` does.
    """
    values = plain_config(config)
    top = {key: value for key, value in values.items() if key not in SECTIONS}
    for key in top:
        if key not in get_type_hints(RunConfig):
            raise unknown_key(key, [*SECTIONS, *get_type_hints(RunConfig)])
    resolved = dataclasses.asdict(section(RunConfig, top, ""))
    for name, cls in SECTIONS.items():
        part = values.get(name, {})
        if not isinstance(part, dict):
            raise ConfigError(f"'{name}' is a section of settings, not {part!r}; set '{name}.<key>'")
        resolved[name] = dataclasses.asdict(section(cls, part, name))
    return resolved


def save(config: Mapping[str, Any], workdir: str | os.PathLike) -> str:
    """Write `config` to `workdir/config.json` (at once or not at all); returns the path."""
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, "config.json")
    write_whole(path, json.dumps(plain_config(config), indent=1) + "\n", mode=0o600)
    return path


def load(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration of the run in `workdir`, checked as by `resolve`; raises `ConfigError` where there is none."""
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            return resolve(json.load(file))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: start the run with `python -m areal_jax.launch --config=... --workdir={workdir}`"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None


def plain_config(value: Any) -> Any:
    """ConfigDicts as dicts, all the way down."""
    if isinstance(value, ConfigDict):
        value = {key: value[key] for key in value}  # resolves references, unlike to_dict on nested tuples
    if isinstance(value, Mapping):
        return {key: plain_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_config(item) for item in value)
    return value


def unknown_key(key: str, known: Iterable[str], prefix: str = "") -> ConfigError:
    """The error for a setting that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return ConfigError(f"unknown key '{prefix}{key}'" + (f"; did you mean '{prefix}{close[0]}'?" if close else ""))


def one_line(text: object) -> str:
    """The text of an error, say, without its line breaks."""
    return " ".join(str(text).split())


def _convert(key: str, kind: type, value: Any) -> Any:
    """`value` as `kind` when that loses nothing."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = _NAMES.get(kind, f"a {kind.__name__}")
        raise ConfigError(f"'{key}' must be {expected}, not {value!r} ({type(value).__name__})")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
