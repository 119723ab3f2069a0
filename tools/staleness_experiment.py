"""What staleness does to each objective, on a policy small enough to see: python tools/staleness_experiment.py

A softmax policy whose contexts share features (so that pushing one answer down pushes others around, as in a language
model) learns by policy gradient from responses that it sampled LAG training steps ago. Every objective sees the same
seeds, the same lags and plain SGD at the same rates; each step is one batch in two minibatches. The table and the plot
show the probability of a right token at the end of training, which is computed exactly, not sampled.

It is a toy: it shows mechanisms, not which objective is best for a language model. It runs on one CPU core in under two
minutes, and needs matplotlib for the plot only.
"""

import argparse
import functools
import json
import os
import platform
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np

from areal_jax import advantages, losses

LAGS = (0, 16, 64, 256)
RATES = (1.0, 4.0, 12.0)
CONTEXTS, FEATURES, POSITIONS, VOCAB = 48, 10, 4, 8
PROMPTS, GROUP, MINIBATCHES = 16, 8, 2

# name -> loss(current, proximal, behaviour, advantages, mask); defaults of the library unless a value is shown
OBJECTIVES = {
    "naive": lambda lp, prox, behav, adv, mask: losses.reinforce_loss(lp, adv, mask),
    "SPO 0.5": lambda lp, prox, behav, adv, mask: losses.scaled_policy_loss(lp, adv, mask, negative_scale=0.5),
    "ASymPO": lambda lp, prox, behav, adv, mask: losses.asympo_loss(lp, adv, mask),
    "TOPR": lambda lp, prox, behav, adv, mask: losses.topr_loss(lp, behav, adv, mask),
    "PPO clip": lambda lp, prox, behav, adv, mask: losses.ppo_clip_loss(lp, behav, adv, mask),
    "decoupled PPO": lambda lp, prox, behav, adv, mask: losses.decoupled_ppo_loss(
        lp, prox, behav, adv, mask, weight_cap=5.0, cap_mode="clamp"
    ),
}


def log_policy(weights, features):
    """[P, F, V], [C, F] -> log-probabilities [C, P, V]."""
    return jax.nn.log_softmax(jnp.einsum("cf,pfv->cpv", features, weights), axis=-1)


def chosen(weights, features, tokens):
    """Log-probs of tokens [C, G, P] -> [C, G, P]."""
    table = log_policy(weights, features)[:, None]
    return jnp.take_along_axis(table, tokens[..., None], axis=-1)[..., 0]


def train(objective, steps, key, lag, rate):
    """One run of objective number `objective`, by plain SGD at `rate`, on responses sampled `lag` steps ago.

    Returns the mean probability of a right token after every step [steps], and the final norm of the weights.
    """
    key_features, key_targets, key = jax.random.split(key, 3)
    features = jax.random.normal(key_features, (CONTEXTS, FEATURES))
    targets = jax.random.randint(key_targets, (CONTEXTS, POSITIONS), 0, VOCAB)

    def step(carry, index):
        weights, history = carry
        history = history.at[index % history.shape[0]].set(weights)
        behaviour = history[jnp.maximum(index - lag, 0) % history.shape[0]]
        key_prompts, key_tokens = jax.random.split(jax.random.fold_in(key, index))
        prompts = jax.random.permutation(key_prompts, CONTEXTS)[:PROMPTS]
        table = log_policy(behaviour, features[prompts])
        tokens = jax.random.categorical(key_tokens, table[:, None], shape=(PROMPTS, GROUP, POSITIONS))
        rewards = (tokens == targets[prompts][:, None]).mean(-1, dtype=jnp.float32)
        group_ids = jnp.repeat(jnp.arange(PROMPTS), GROUP)
        advantage = advantages.group_relative(rewards.reshape(-1), group_ids, num_groups=PROMPTS)
        advantage = jnp.broadcast_to(advantage.reshape(PROMPTS, GROUP, 1), tokens.shape)
        batch = (prompts, tokens, chosen(behaviour, features[prompts], tokens), advantage)
        batch = (*batch, chosen(weights, features[prompts], tokens))  # the proximal policy: before this step

        def update(weights, minibatch):
            prompts, tokens, behav, advantage, prox = minibatch
            mask = jnp.ones(tokens.shape, bool)

            def loss(weights):
                current = chosen(weights, features[prompts], tokens)
                # a switch, so that all objectives share one compilation
                per_token = jax.lax.switch(
                    objective, tuple(OBJECTIVES.values()), current, prox, behav, advantage, mask
                )
                return losses.aggregate(per_token, mask, mode="seq_mean_token_mean").mean()

            return weights - rate * jax.grad(loss)(weights), None

        batch = jax.tree.map(lambda x: x.reshape(MINIBATCHES, -1, *x.shape[1:]), batch)
        weights, _ = jax.lax.scan(update, weights, batch)
        right = jnp.take_along_axis(jnp.exp(log_policy(weights, features)), targets[..., None], axis=-1)
        return (weights, history), right.mean()

    weights = jnp.zeros((POSITIONS, FEATURES, VOCAB))
    history = jnp.zeros((max(LAGS) + 1, *weights.shape))
    (weights, _), curve = jax.lax.scan(step, (weights, history), jnp.arange(steps))
    return curve, jnp.linalg.norm(weights)


@functools.partial(jax.jit, static_argnums=1)
def sweep(objective, steps, keys):
    """All learning rates, lags and seeds at once -> curves [R, L, S, steps], norms [R, L, S]."""
    run = functools.partial(train, objective, steps)
    run = jax.vmap(run, (0, None, None))
    run = jax.vmap(run, (None, 0, None))
    run = jax.vmap(run, (None, None, 0))
    return run(keys, jnp.array(LAGS), jnp.array(RATES))


def by_rate(values) -> dict[str, list]:
    """[R, ...] -> one plain list per learning rate."""
    return {str(rate): np.round(values[i].astype(float), 4).tolist() for i, rate in enumerate(RATES)}


def machine() -> str:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, jax {jax.__version__}"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(RATES), 1 + len(LAGS)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.9 * rows), sharey=True)
    colours = dict(zip(OBJECTIVES, plt.get_cmap("tab10").colors))
    for row, rate in zip(axes, RATES):
        for name, result in results.items():
            end, error = result["end"][str(rate)], result["standard_error"][str(rate)]
            row[0].errorbar(range(len(LAGS)), end, error, label=name, color=colours[name], marker="o", capsize=2)
            for axis, curve in zip(row[1:], result["curves"][str(rate)]):
                axis.plot(np.linspace(0, 1, len(curve)) * result["steps"], curve, color=colours[name], linewidth=1.2)
        row[0].set_xticks(range(len(LAGS)), [str(lag) for lag in LAGS])
        row[0].set(xlabel="lag (training steps)", ylabel=f"P(right token), learning rate {rate}", title="at the end")
        for axis, lag in zip(row[1:], LAGS):
            axis.set(title=f"lag {lag}", xlabel="training step")
        for axis in row:
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write every number here")
    parser.add_argument("--plot", help="write the plot (PNG) here")
    parser.add_argument("--steps", type=int, default=1500, help="training steps; each is one version")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    arguments = parser.parse_args()
    for path in filter(None, (arguments.json, arguments.plot)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            parser.error(f"there is no folder for {path}")

    keys = jax.vmap(jax.random.key)(arguments.seed + jnp.arange(arguments.seeds))
    print(f"P(right token) after {arguments.steps} steps (chance: {1 / VOCAB:.3f})")
    print(f"mean over {arguments.seeds} seeds ± standard error; on {machine()}\n")
    results, started = {}, time.perf_counter()
    for number, name in enumerate(OBJECTIVES):
        curves, norms = (np.asarray(x) for x in sweep(number, arguments.steps, keys))
        final = curves[..., -max(1, arguments.steps // 30) :].mean(-1)
        thin = curves.mean(2)[..., :: max(1, arguments.steps // 150)]
        results[name] = {
            "steps": arguments.steps,
            "end": by_rate(final.mean(-1)),
            "standard_error": by_rate(final.std(-1, ddof=1) / np.sqrt(arguments.seeds)),
            "best_on_the_way": by_rate(curves.mean(2).max(-1)),
            "weight_norm": by_rate(norms.mean(-1)),
            "curves": by_rate(thin),
        }
    seconds = time.perf_counter() - started
    for rate in RATES:
        print(f"learning rate {rate}")
        print(f"{'objective':<15}" + "".join(f"{f'lag {lag}':>16}" for lag in LAGS) + f"{'lost at 256':>13}{'norm':>7}")
        for name, result in results.items():
            end, error = result["end"][str(rate)], result["standard_error"][str(rate)]
            cells = "".join(f"{f'{e:.3f} ± {s:.3f}':>16}" for e, s in zip(end, error))
            print(f"{name:<15}{cells}{end[0] - end[-1]:>13.3f}{result['weight_norm'][str(rate)][-1]:>7.0f}")
        print()
    print(f"{seconds:.0f} s, compilation included")
    if arguments.json:
        record = {"machine": machine(), "seconds": round(seconds, 1), "lags": LAGS, "rates": RATES, "results": results}
        record |= {"steps": arguments.steps, "seeds": arguments.seeds, "first_seed": arguments.seed}
        with open(arguments.json, "w") as file:
            json.dump(record, file)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
