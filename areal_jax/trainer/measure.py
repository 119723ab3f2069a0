"""What a training step reports: sums with their counts, which add up over micro-batches and devices, divided once.

The mismatch panel compares the trainer's log-probs under the parameters of version v with those the engine stored. For
tokens sampled by version v itself (lag 0) both should be the same number: what is left is the difference between the
two programs, before any correction. Tokens with lag above 0 are kept apart: there, the policy has really moved.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from areal_jax import corrections
from areal_jax.losses import Weighted

Sums = dict[str, dict]  # {"mean": {name: Weighted}, "max": {name: float32 scalar}}

# The library's name of a mean -> the field's; what has no entry is not reported.
_NAMES = {
    "logprob_abs_difference": "logprob_abs_diff_mean",
    "logprob_difference_std": "logprob_diff_std",
    "probability_difference": "prob_diff_mean",
    "probability_abs_difference": "prob_abs_diff_mean",
    "probability_correlation": "pearson",
    "k1_kl": "kl",
    "k3_kl": "k3_kl",
    "ratio_mean": "mean",
    "ratio_std": "std",
    "effective_sample_size": "ess",
    "chi_square": "chi_square",
    "masked_frac": "masked_frac",
}
OF_UPDATE = ("actor/grad_norm", "actor/update_norm", "actor/learning_rate", "actor/skipped_updates")
PANELS = ("mismatch", "mismatch_stale", "is")


def add(a: Sums, b: Sums) -> Sums:
    """The sums of both; `b` may lack names that `a` has."""
    mean = {name: x + b["mean"][name] if name in b["mean"] else x for name, x in a["mean"].items()}
    largest = {name: jnp.maximum(x, b["max"][name]) if name in b["max"] else x for name, x in a["max"].items()}
    return {"mean": mean, "max": largest}


class Recorder:
    """Collects the sums of one micro-batch while its loss is traced."""

    def __init__(self):
        self.sums: Sums = {"mean": {}, "max": {}}

    def mean(self, name: str, values: jax.Array, mask: jax.Array) -> None:
        """Adds the mean of `values` where `mask` (bool) holds, both `[...]`."""
        total = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(values), 0.0))
        self.sums["mean"][name] = Weighted(total, mask.sum(dtype=jnp.int32).astype(jnp.float32))

    def total(self, name: str, value: jax.Array) -> None:
        """Adds a scalar that is already divided; `update` counts it, once per minibatch."""
        self.sums["mean"][name] = Weighted(jax.lax.stop_gradient(value), jnp.zeros((), jnp.float32))

    def policy(self, logprobs, entropy, advantages, mask) -> None:
        """Entropy, and how likely the policy finds the good and the bad tokens."""
        self.mean("actor/entropy", entropy, mask)
        self.mean("actor/positive_nll", -logprobs, mask & (advantages > 0))
        self.mean("actor/negative_nll", -logprobs, mask & (advantages < 0))

    def trust_region(self, logprobs, anchor, advantages, mask, clip: dict[str, Any]) -> None:
        """KL from the anchor policy, and how many tokens the clip holds, on which side; `clip`: the keywords of
        `corrections.clip_fractions`, empty for an objective without one."""
        self.mean("actor/ppo_kl", anchor - logprobs, mask)
        if clip:
            low, high = corrections.clip_fractions(jax.lax.stop_gradient(logprobs), anchor, advantages, mask, **clip)
            self.sums["mean"] |= {"actor/clip_fraction_low": low, "actor/clip_fraction_high": high}

    def importance(self, trainer, behavior, mask, kept: jax.Array | None) -> None:
        """Weights π_prox / π_behav of the trained tokens, and the share that a correction or a cap leaves out."""
        for name, pair in corrections.ratio_diagnostics(trainer, behavior, mask).items():
            if not name.startswith("sequence_"):
                self.sums["mean"][f"is/{name}"] = pair
        self.sums["max"]["is/max"] = corrections.max_ratio(trainer, behavior, mask)
        if kept is not None:
            self.sums["mean"]["is/masked_frac"] = corrections.masked_fraction(kept, mask)

    def mismatch(self, trainer, behavior, fresh, stale) -> None:
        """The panel, for tokens of lag 0 (`fresh`) and above; `trainer` is of the parameters before the step."""
        for panel, mask in (("mismatch", fresh), ("mismatch_stale", stale)):
            for name, pair in corrections.mismatch_statistics(trainer, behavior, mask).items():
                self.sums["mean"][f"{panel}/{name}"] = pair
            difference = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(trainer) - behavior), 0.0)
            self.sums["max"][f"{panel}/logprob_abs_diff_max"] = jnp.max(difference)


def finish(sums: Sums) -> dict[str, float]:
    """The report of a step, on the host, under the field's names; what was never counted is left out.

    `ess` is the effective share of the tokens, (mean w)² / mean w², w = trainer / engine. `ppl_ratio` is the trainer's
    perplexity over the engine's.
    """
    pairs = {name: Weighted(*map(np.float32, pair)) for name, pair in sums["mean"].items()}
    counted = {name: pair for name, pair in pairs.items() if pair.denominator > 0}
    report: dict[str, float] = {}
    for panel in PANELS:
        prefix = f"{panel}/"
        inside = {n.removeprefix(prefix): counted.pop(n) for n in list(counted) if n.startswith(prefix)}
        if not inside:
            continue
        means = summarize(inside)
        report |= {prefix + _NAMES[name]: value for name, value in means.items() if name in _NAMES}
        report |= {name: float(x) for name, x in sums["max"].items() if name.startswith(prefix)}
        if panel != "is":
            report[f"{panel}/ppl_ratio"] = float(np.exp(np.clip(means["k1_kl"], -20, 20)))
            report[f"{panel}/tokens"] = float(inside["k1_kl"].denominator)
    report |= {name: float(pair.sum) / float(pair.denominator) for name, pair in counted.items()}
    if "actor/skipped_updates" in counted:
        report["actor/skipped_updates"] = float(counted["actor/skipped_updates"].sum)  # how many, of a step's several
    if "actor/clip_fraction_low" in report:
        report["actor/clip_fraction"] = report["actor/clip_fraction_low"] + report["actor/clip_fraction_high"]
    return report


def summarize(pairs: dict[str, Weighted]) -> dict[str, float]:
    """`corrections.summarize` on the CPU's numbers, so that reporting never compiles anything for an accelerator."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return {name: float(value) for name, value in corrections.summarize(pairs).items()}


def diagnose(
    report: dict[str, float], *, compute_dtype: str, limit: float | None = None, restricted: bool = False
) -> str:
    """A warning that names the likely cause when engine and trainer disagree at lag 0; empty when they agree.

    The default limit on the mean |Δ log-prob| is 1e-3 in float32 and 0.05 in bfloat16. `restricted`: the engine was
    told to sample from a part of the distribution, renormalised; the trainer's is the whole one. That difference has
    a direction, is in the importance weights, and is no fault.
    """
    mean = report.get("mismatch/logprob_abs_diff_mean")
    if limit is None:
        limit = 1e-3 if compute_dtype == "float32" else 0.05
    if mean is None or mean <= limit:
        return ""
    worst, kl = report["mismatch/logprob_abs_diff_max"], report["mismatch/kl"]
    # Rounding is as often up as down. Another temperature makes the likely tokens likelier (or less likely); where the
    # log-probs are not of the distribution that was sampled from, even their mean moves.
    tilt = abs(report["mismatch/prob_diff_mean"]) > 0.3 * report["mismatch/prob_abs_diff_mean"]
    tilt = tilt or abs(kl) > 0.1 * mean
    if not np.isfinite(mean):
        cause = "a log-prob is not finite: look at the engine's sampling settings and at the weights it loaded"
    elif mean > 0.3:
        cause = (
            "so large a difference means other weights, another temperature or top-p, log-probs that are not the "
            "processed ones, or tokens out of alignment"
        )
    elif worst > 50 * mean:
        cause = "a few tokens carry it: a wrong version stamp, or caches that outlived their weights, at an update"
    elif not tilt:
        cause = "it has no direction: rounding, as from a lower precision (of the engine, its head, or compute_dtype)"
    elif restricted:
        return ""
    else:
        cause = (
            "it has a direction: a sampling transformation (temperature, top-p, top-k) on one side only, as when the "
            "engine's log-probs are not the processed ones"
        )
    found = f"mean |Δ log-prob| {mean:.2g} (limit {limit:g}), max {worst:.2g}"
    return f"engine and trainer disagree at lag 0: {found}; {cause}"
