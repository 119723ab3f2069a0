"""The launcher's command line: a config file, changes to single settings, and a few options; no flag library needed.

    --config=FILE                      a Python file with `get_config()`, from `areal_jax.config.default_config()`
    --config.trainer.steps=20          one setting; tuples and dicts are written as in Python
    --config.rollout.engine_args.x=1   a key of a free-form dict
    --workdir=DIR --dry_run --prepare --nodes=N --node=I

An option given twice counts the last time. Everything that is wrong raises `ConfigError`, one line.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import runpy
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from areal_jax.config import SECTIONS, ConfigError, RunConfig, one_line, unknown_key

_FREE_FORM = object()


@dataclasses.dataclass
class Command:
    """What the command line asks for."""

    config: ConfigDict | None  # None: that of the prepared run, of which one node is to be started
    workdir: str | None = None
    dry_run: bool = False
    prepare: bool = False
    nodes: int = 0  # of a cluster; 0: none were named
    node: int = -1  # -1: none


def parse(arguments: Sequence[str]) -> Command | None:
    """The command that `arguments` (without the program's name) give; None when they ask for help."""
    options: dict[str, Any] = {"dry_run": False, "prepare": False, "workdir": None, "config": None}
    options |= {"nodes": 0, "node": -1}
    changes = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--helpfull"):
            return None
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is not understood; write --config.key=value (see --help)")
        if name in ("dry_run", "prepare"):
            options[name] = _as_bool(name, value) if equals else True
            continue
        if not equals:
            if not words:
                raise ConfigError(f"--{name} needs a value: --{name}=...")
            value = words.pop(0)
        if name.startswith("config."):
            changes.append((name.removeprefix("config."), value))
        elif name in ("nodes", "node"):
            if not value.isdecimal() or int(value) < (name == "nodes"):
                raise ConfigError(f"--{name}={value}: nodes are counted from 1, and numbered from 0")
            options[name] = int(value)
        elif name in options:
            options[name] = value
        else:
            known = ", ".join(f"--{name}" for name in options)
            raise ConfigError(f"unknown option --{name}; known: {known}")
    options["config"] = _config(options, changes)
    return Command(**options)


def _config(options: dict[str, Any], changes: Sequence[tuple[str, str]]) -> ConfigDict | None:
    if options["node"] >= 0:
        if options["config"] is not None or changes:
            raise ConfigError("--node starts a part of a prepared run: its settings are given with --prepare")
        if not options["nodes"]:
            raise ConfigError("--node needs --nodes as well: how many there are")
        if options["dry_run"] or options["prepare"]:
            raise ConfigError("--node starts roles: leave --dry_run and --prepare out")
        return None
    if options["nodes"] and not (options["prepare"] or options["dry_run"]):
        raise ConfigError("--nodes starts nothing by itself: give --prepare, --dry_run or, on each node, --node=I")
    if options["config"] is None:
        raise ConfigError("no config given: --config=configs/quickstart.py")
    config = load_file(options["config"])
    for key, value in changes:
        change(config, key, value)
    return config


def load_file(path: str) -> ConfigDict:
    """The config that a file's `get_config()` returns."""
    if not os.path.isfile(path):
        raise ConfigError(f"the config file '{path}' does not exist")
    try:
        config = runpy.run_path(path)["get_config"]()
    except ConfigError:
        raise
    except KeyError as error:
        if error.args == ("get_config",):
            raise ConfigError(f"the config file '{path}' defines no get_config()") from None
        raise ConfigError(f"the config file '{path}' raises KeyError: {one_line(error)}") from None
    except AttributeError as error:
        raise _unknown_attribute(path, str(error)) from None
    except Exception as error:  # it is a program, and may raise anything
        raise ConfigError(f"the config file '{path}' raises {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of '{path}' returns a {type(config).__name__}, not a ConfigDict")
    return config


def change(config: ConfigDict, key: str, value: str) -> None:
    """Set the setting with the dotted name `key` to what the text `value` says, of the setting's own type."""
    *path, last = key.split(".")
    node: Any = config
    free = False
    for i, part in enumerate([*path, last]):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"'{key}': '{'.'.join([*path, last][:i])}' is not a group of settings")
        if part not in node and not free:
            prefix = "".join(f"{p}." for p in [*path, last][:i])
            raise unknown_key(part, list(node), prefix) if i else unknown_key(part, known_keys(), "")
        free = free or part in _free_form_keys()
        if part is last or i == len(path):
            break
        if part not in node:
            with node.unlocked():
                node[part] = ConfigDict()
        node = node[part]
    old = node.get(last, _FREE_FORM)
    with node.unlocked(), node.ignore_type():
        node[last] = _convert(key, old, value)


def known_keys() -> list[str]:
    """Every top-level name, and every setting with its section."""
    settings = [f"{name}.{field.name}" for name, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
    return [*(field.name for field in dataclasses.fields(RunConfig)), *SECTIONS, *settings]


def _free_form_keys() -> set[str]:
    return {f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls) if f.default_factory is dict}


def _convert(key: str, old: Any, value: str) -> Any:
    """The text as a value of the type of `old`; `resolve` checks the rest."""
    if isinstance(old, bool):
        return _as_bool(key, value)
    if isinstance(old, str):
        return value
    try:
        new = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        if old is _FREE_FORM:
            return value
        if isinstance(old, tuple) and value:
            return (value,)  # one text, as in --config.rewards.verifiers=my_task:reward
        kind = "a dict" if isinstance(old, ConfigDict) else f"of type {type(old).__name__}"
        raise ConfigError(f"'{key}' must be {kind}, and '{value}' is not") from None
    if isinstance(old, tuple) and not isinstance(new, (tuple, list)):
        return (new,)
    return ConfigDict(new) if isinstance(new, dict) else new


def _as_bool(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"'{key}' must be True or False, and '{value}' is neither")
    return value.lower() in ("true", "1")


def _unknown_attribute(path: str, message: str) -> ConfigError:
    """ml_collections' refusal of an unknown key, with a suggestion instead of the list of all keys."""
    found = re.search(r'Key "([\w.]+)" does not exist', message)
    if found is None:
        return ConfigError(f"the config file '{path}' raises AttributeError: {one_line(message)}")
    last = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    error = str(unknown_key(found.group(1), last))
    suggested = re.search(r"did you mean '(\w+)'", error)
    if suggested:
        error = error.replace(f"mean '{suggested.group(1)}'", f"mean '{last[suggested.group(1)]}'")
    return ConfigError(f"{error} (in {path})")
