"""From names in a config to what a training step minimises: one objective, its correction, penalties, and reduction.

The mathematics is the library's (`losses`, `corrections`); here is only which of the step's arrays go where. Whether a
name or a hyper-parameter exists is answered by the library's own signatures, before a run starts.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from areal_jax import _aggregate, corrections, losses
from areal_jax.config import one_line
from areal_jax.trainer import measure


class ObjectiveError(ValueError):
    """An objective, correction or setting that does not exist or cannot be combined; the message says what does."""


OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    "decoupled_ppo": losses.decoupled_ppo_loss,
    "ppo_clip": losses.ppo_clip_loss,
    "reinforce": losses.reinforce_loss,
    "cispo": losses.cispo_loss,
    "gspo": losses.gspo_loss,
    "topr": losses.topr_loss,
    "aipo": losses.aipo_loss,
    "sapo": losses.sapo_loss,
    "vespo": losses.vespo_loss,
    "mirror_descent": losses.mirror_descent_loss,
    "asympo": losses.asympo_loss,
    "spo": losses.scaled_policy_loss,
}
# Corrections multiply the loss of a token by a detached weight, or take the token out of the loss (never out of the
# denominator). "whole_batch" ones look at all tokens of the batch at once.
CORRECTIONS: dict[str, tuple[str, Callable[..., jax.Array] | None]] = {
    "none": ("", None),
    "tis": ("weight", corrections.tis_weights),
    "icepop": ("weight", corrections.icepop_weights),
    "sequence_is": ("mask", corrections.sequence_is_mask),
    "opsm": ("mask", corrections.opsm_mask),
    "dppo": ("mask", corrections.dppo_mask),
    "m2po": ("whole_batch", corrections.m2po_mask),
    "m2po_all_tokens": ("whole_batch", corrections.m2po_all_tokens_mask),
}
PROXIMAL = ("recompute", "loglinear", "fused")

# Arguments of the library's functions that the step fills in; every other keyword is a hyper-parameter.
_GIVEN = {
    "logprobs", "old_logprobs", "proximal_logprobs", "behavior_logprobs", "train_old", "sampler", "advantages", "mask",
    "weights", "segment_ids", "num_segments",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, fully decided. Hashable but for its dicts; make it with `make`."""

    name: str
    args: dict[str, Any]
    correction: str
    correction_args: dict[str, Any]
    aggregate: str
    kl_coef: float
    entropy_coef: float
    proximal: str  # of PROXIMAL, or "none" where nothing needs it
    num_segments: int  # sequences in one row at most
    horizon: float  # for seq_mean_token_sum_norm: tokens

    @property
    def recompute(self) -> bool:
        """Whether a pass over the batch must come first, for proximal log-probs."""
        return self.proximal == "recompute"

    @property
    def whole_batch(self) -> bool:
        """Whether the correction must see the whole batch at once (`keep`)."""
        return CORRECTIONS[self.correction][0] == "whole_batch"

    @property
    def token_level(self) -> bool:
        """Whether the loss is a sum over tokens, each of them alone, so that any part of a row is as good as a row."""
        functions = (OBJECTIVES[self.name], CORRECTIONS[self.correction][1])
        whole = any(f is not None and "segment_ids" in _parameters(f) for f in functions)
        return not whole and self.aggregate != "seq_mean_token_mean"

    def loss(self, logprobs, entropy, micro, scalars, proximal, reference, keep) -> tuple[jax.Array, measure.Sums]:
        """The loss of one micro-batch over the minibatch's denominators, and what was measured.

        All arrays are `[rows, row_length]`: `logprobs` and `entropy` of the current parameters, `proximal` and
        `reference` log-probs, `keep` bool; the last three are None where the settings do not need them.
        """
        mask, behavior, advantages = micro["mask"], micro["behavior_logprobs"], micro["advantages"]
        current = jax.lax.stop_gradient(logprobs)
        anchor = self._anchor(current, proximal, behavior, micro["versions"], scalars["version"])
        weighted = CORRECTIONS[self.correction][0] == "weight"
        arrays = {
            "logprobs": logprobs,
            "proximal_logprobs": anchor,
            "behavior_logprobs": behavior,
            "old_logprobs": anchor if weighted else behavior,  # the weight carries π_prox / π_behav, if there is one
            "train_old": anchor,
            "sampler": behavior,
            "advantages": advantages,
            "mask": mask,
            "segment_ids": micro["segment_ids"],
            "num_segments": self.num_segments,
        }
        weights, kept = self._correct(arrays, keep)
        arrays["mask"] = mask if kept is None else mask & kept
        per_token = _call(OBJECTIVES[self.name], arrays, self.args)
        if weights is not None:
            per_token = per_token * weights
        loss = self._reduce(per_token, mask, micro, scalars, self.aggregate)
        record = measure.Recorder()
        if self.entropy_coef:
            loss -= self.entropy_coef * self._reduce(entropy, mask, micro, scalars, "token_mean")
        if reference is not None:
            kl = losses.kl_penalty(logprobs, reference, mask, kind="k3")
            loss += self.kl_coef * self._reduce(kl, mask, micro, scalars, self.aggregate)  # inside the sums, as in GRPO
            record.mean("actor/ref_kl", kl, mask)

        record.total("actor/loss", loss)
        record.policy(logprobs, entropy, advantages, mask)
        takes, args = _parameters(OBJECTIVES[self.name]), _defaults(OBJECTIVES[self.name]) | self.args
        trusted = anchor if "proximal_logprobs" in takes else arrays["old_logprobs"]
        clip = {name: args[name] for name in ("clip_low", "clip_high") if name in takes}
        if clip and "segment_ids" in takes:  # the ratio is a sequence's
            clip |= {"per_sequence": True, "segment_ids": micro["segment_ids"], "num_segments": self.num_segments}
        record.trust_region(logprobs, trusted, advantages, mask, clip)
        before = current if proximal is None else proximal  # of the parameters before this training step, if measured
        measured = mask if proximal is not None else mask & scalars["measured"]
        lag = scalars["version"] - micro["versions"]
        record.mismatch(before, behavior, measured & (lag <= 0), measured & (lag > 0))
        importance = before if anchor is None else anchor
        if args.get("weight_cap") is not None and args["cap_mode"] == "mask":
            capped = jnp.exp(importance - behavior) > args["weight_cap"]
            kept = ~capped if kept is None else kept & ~capped
        record.importance(importance, behavior, mask, kept)
        return loss, record.sums

    def trace(self) -> None:
        """Raises what the library raises for an argument that cannot be used; computes nothing, needs no device."""
        self.zero_sums()
        if self.whole_batch:
            row, flag = (jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.float32, jnp.bool_))
            arrays = {"logprobs": row, "behavior_logprobs": row, "advantages": row, "mask": flag}
            jax.eval_shape(self.keep_over_batch, arrays)

    def zero_sums(self) -> measure.Sums:
        """The sums of nothing: float32 zeros (numpy) with every name that `loss` and the update record."""
        row = jax.ShapeDtypeStruct((1, self.num_segments), jnp.float32)
        ids, flag = (jax.ShapeDtypeStruct(row.shape, dtype) for dtype in (jnp.int32, jnp.bool_))
        micro = {"mask": flag, "behavior_logprobs": row, "advantages": row, "segment_ids": ids, "versions": ids}
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        scalars = {"num_tokens": scalar, "num_sequences": scalar, "version": jax.ShapeDtypeStruct((), jnp.int32)}
        scalars["measured"] = jax.ShapeDtypeStruct((), jnp.bool_)
        given = (row if self.recompute else None, row if self.kl_coef else None, flag if self.whole_batch else None)
        sums = jax.eval_shape(self.loss, row, row, micro, scalars, *given)[1]
        zero = jax.tree.map(lambda _: np.float32(0), sums)
        zero["mean"] |= {name: losses.Weighted(np.float32(0), np.float32(0)) for name in measure.OF_UPDATE}
        return zero

    def keep_over_batch(self, arrays: dict[str, Any]) -> jax.Array:
        """For a `whole_batch` correction: bool, which tokens stay, given the arrays of the whole batch, of any shape.

        `arrays`: logprobs (proximal), behavior_logprobs, advantages, mask.
        """
        return _call(CORRECTIONS[self.correction][1], arrays, self.correction_args)

    def _anchor(self, current, proximal, behavior, versions, version) -> jax.Array | None:
        """Log-probs of the policy before this training step; None where neither objective nor correction needs it."""
        if self.proximal == "recompute":
            return proximal
        if self.proximal == "loglinear":
            return corrections.interpolate_proximal_logprobs(behavior, current, versions, version + 1)
        return current if self.proximal == "fused" else None

    def _correct(self, arrays: dict[str, Any], keep) -> tuple[jax.Array | None, jax.Array | None]:
        """(weights, which tokens stay)."""
        kind, function = CORRECTIONS[self.correction]
        if kind == "":
            return None, None
        if kind == "whole_batch":
            return None, keep
        result = _call(function, arrays, self.correction_args)
        return (result, result > 0) if kind == "weight" else (None, result)

    def _reduce(self, per_token, mask, micro, scalars, mode: str) -> jax.Array:
        total = losses.aggregate(
            per_token, mask, mode=mode, num_tokens=scalars["num_tokens"], num_sequences=scalars["num_sequences"],
            horizon=self.horizon, segment_ids=micro["segment_ids"], num_segments=self.num_segments,
        )  # fmt: skip
        return total.sum / total.denominator


def make(
    name: str,
    args: dict[str, Any] | None = None,
    *,
    correction: str = "none",
    correction_args: dict[str, Any] | None = None,
    aggregate: str = "token_mean",
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    proximal: str = "recompute",
    minibatches: int = 1,
    num_segments: int = 64,
    horizon: float = 1.0,
) -> Objective:
    """Checks a combination of settings and returns the objective; raises `ObjectiveError`, one line, what to change."""
    args, correction_args = dict(args or {}), dict(correction_args or {})
    function = check_known("trainer.objective", name, OBJECTIVES)
    check_args("trainer.objective_args", name, function, args)
    kind, correct = check_known("trainer.correction", correction, CORRECTIONS)
    if correct is not None:
        check_args("trainer.correction_args", correction, correct, correction_args)
    elif correction_args:
        raise ObjectiveError("trainer.correction_args is set but trainer.correction is 'none'")
    check_known("trainer.aggregate", aggregate, dict.fromkeys(_aggregate.MODES))
    check_known("trainer.proximal", proximal, dict.fromkeys(PROXIMAL))
    if proximal == "fused" and minibatches != 1:
        raise ObjectiveError(
            f"trainer.proximal='fused' is exact with one minibatch only, and trainer.minibatches={minibatches}: "
            "use proximal='recompute' or 'loglinear', or minibatches=1"
        )
    if kind == "weight" and "behavior_logprobs" in _parameters(function):
        raise ObjectiveError(
            f"trainer.correction={correction!r} would weigh by the behaviour policy twice: {name!r} already does. "
            "Use the bounds that its objective_args have, or a mask correction"
        )
    if kind == "whole_batch" and proximal != "recompute":
        raise ObjectiveError(f"trainer.correction={correction!r} sees the whole batch: it needs proximal='recompute'")
    anchored = any(n in _parameters(f) for f, n in ((function, "proximal_logprobs"), (correct, "train_old")) if f)
    if not anchored and kind != "whole_batch":
        proximal = "none"
    made = Objective(
        name=name, args=args, correction=correction, correction_args=correction_args, aggregate=aggregate,
        kl_coef=kl_coef, entropy_coef=entropy_coef, proximal=proximal, num_segments=num_segments, horizon=horizon,
    )  # fmt: skip
    try:
        made.trace()
    except (TypeError, ValueError) as error:  # an argument's value: a text for a number, an unknown choice
        given = f"trainer.objective_args={args}" + (f", correction_args={correction_args}" if correction_args else "")
        raise ObjectiveError(f"{given} cannot be computed with: {one_line(error)}") from None
    return made


def check_known(setting: str, name: str, table: dict[str, Any]) -> Any:
    """The table's entry of that name, or an `ObjectiveError` that lists the names there are."""
    if name not in table:
        raise ObjectiveError(f"{setting}={name!r} is unknown; known: {', '.join(table)}")
    return table[name]


def check_args(setting: str, name: str, function: Callable, args: dict[str, Any], given: set[str] = _GIVEN) -> None:
    """Raises `ObjectiveError` if `args` are not the keyword arguments of `function`, those in `given` aside."""
    own = {n: p for n, p in _parameters(function).items() if n not in given}
    if unknown := sorted(set(args) - set(own)):
        takes = ", ".join(own) or "no arguments"
        raise ObjectiveError(f"{setting} {', '.join(unknown)}: {name!r} has no such argument; it takes {takes}")
    if missing := [n for n, p in own.items() if p.default is p.empty and n not in args]:
        raise ObjectiveError(f"{setting} lacks {', '.join(missing)}, which {name!r} requires (it has no default)")


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _defaults(function: Callable) -> dict[str, Any]:
    return {n: p.default for n, p in _parameters(function).items() if p.default is not p.empty and n not in _GIVEN}


def _call(function: Callable[..., jax.Array], arrays: dict[str, Any], args: dict[str, Any]) -> jax.Array:
    """Calls a function of the library with those of the arrays that its signature names."""
    return function(**{n: arrays[n] for n in _parameters(function) if n in arrays}, **args)
