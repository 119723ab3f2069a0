"""Verifiers by import path: what the path names, and which of a record's fields the function takes."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from areal_jax.data.formats import BadRecord
from areal_jax.rewards.outcome import VerifierError

GIVEN = ("prompt", "completion", "prompt_tokens", "completion_tokens", "time_limit")  # besides a record's fields
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_verifier(path: str) -> Callable[..., Any]:
    """The function that `path` ("package.module.function" or "package.module:function") names.

    Raises `VerifierError` in one line if it does not import, does not exist or cannot be called.
    """
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise VerifierError(f"reward function {path!r}: expected package.module.function")
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise VerifierError(f"reward function {path!r} does not import: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise VerifierError(f"reward function {path!r} is a {type(target).__name__}, not a function")
    return target


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """What `function` takes; to ask costs more than to judge a number, so whoever calls often keeps it."""
    return list(inspect.signature(function).parameters.values())


def accepted(
    function: Callable[..., Any], fields: Mapping[str, Any], parameters: Sequence[inspect.Parameter] | None = None
) -> dict[str, Any]:
    """The part of `fields` that `function` takes by keyword; all of it if the function takes `**kwargs`.

    `parameters` are its `parameters_of`, where the caller has them. Raises `VerifierError` naming a required one that
    `fields` lacks.
    """
    parameters = parameters_of(function) if parameters is None else parameters
    missing = [p.name for p in parameters if p.kind in _NAMED and p.default is p.empty and p.name not in fields]
    if missing:
        name = getattr(function, "__name__", function)
        raise VerifierError(f"{name} needs {missing}; the record has {sorted(fields)}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(fields)
    return {p.name: fields[p.name] for p in parameters if p.kind in _NAMED and p.name in fields}


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises `VerifierError` naming those `arguments` of a recipe that `function` does not take."""
    parameters = parameters_of(function)
    known = [p.name for p in parameters if p.kind in _NAMED]
    strange = sorted(set(arguments) - set(known))
    if strange and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        name = getattr(function, "__name__", function)
        raise VerifierError(f"{name} does not take {', '.join(strange)}; it takes {', '.join(known)}")


def record_check(config: Mapping[str, Any], *, any_workflow: bool = False) -> Callable[[Mapping[str, Any]], None]:
    """`judgeable` for the verifiers of `config` (as resolved); raises as `load_verifier`.

    A workflow of the user's may give the verifiers another record than the data's: then nothing is asked, unless
    `any_workflow`.
    """
    if not (any_workflow or ours(config)):
        return lambda record: None
    rewards = config["rewards"]
    return judgeable([(load_verifier(path), own) for path, own in zip(rewards["verifiers"], rewards["verifier_args"])])


def ours(config: Mapping[str, Any]) -> bool:
    """Whether the workflow is one of this package: its verifiers get the data's records."""
    return config["rollout"]["workflow"].startswith("areal_jax.")


def judgeable(
    verifiers: Sequence[tuple[Callable[..., Any], Mapping[str, Any]]],
) -> Callable[[Mapping[str, Any]], None]:
    """A function that raises `BadRecord` for a record which `verifiers`, functions and arguments, cannot judge by.

    It must have the fields that they need; and a verifier may have a function of its own, as its attribute
    `check_record`, that takes the record's fields by name and raises `VerifierError`.
    """

    def check(record: Mapping[str, Any]) -> None:
        for function, arguments in verifiers:
            try:
                fields = accepted(function, {**record, **dict.fromkeys(GIVEN), **arguments})
                if own := getattr(function, "check_record", None):
                    own(**{name: value for name, value in fields.items() if name not in GIVEN})
            except VerifierError as error:
                raise BadRecord(str(error)) from None

    return check
