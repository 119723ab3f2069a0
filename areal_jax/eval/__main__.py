"""Evaluates a checkpoint: python -m areal_jax.eval --run=runs/x

Settings come from one of
  --run=DIR              a run's folder: its settings and, if no --model is given, the checkpoint that it exported
  --config=FILE          a config file, as for the launcher
  (neither)              the defaults; with --model and --data that is enough
and are changed by --config.KEY=VALUE as for the launcher, or by these short names:
  --model=DIR            checkpoint folder in Hugging Face format
  --data=SPEC            data set (data.eval)           --limit=N         at most so many problems (0: all)
  --format=NAME          its format (data.format)       --samples=N       answers per problem
  --temperature=T        0 is greedy                    --max_new_tokens=N
  --engine=jax|vllm      --workflow=PATH                --verifier=PATH   reward function, by import path
(on a GPU also --config.rollout.dtype=bfloat16 and --config.rollout.slots=256)
What is made of them:
  --ks=1,8,64            which pass@k (default: 1, and powers of two up to --samples)
  --out=DIR              folder of problems.jsonl and summary.json (default with --run: DIR/eval)

Prints avg@n and pass@k with 95 % confidence intervals: Wilson's score interval with one answer per problem, or where
all were judged alike, else a bootstrap over problems. Exit codes: 0 done; 1 something broke, or no sample has a score;
2 something is wrong with the settings; 130 stopped.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from areal_jax import config as configs
from areal_jax.config import ConfigError
from areal_jax.data.config import DataConfig
from areal_jax.data.prompts import load_prompts, load_tokenizer, render_prompt
from areal_jax.data.readers import DataError
from areal_jax.eval.judge import LocalVerifier
from areal_jax.eval.report import PROBLEMS, Writer, summary_of, table
from areal_jax.eval.runner import EvaluationStopped, Evaluator, Result, checkpoint_tensors
from areal_jax.launch import command_line, validate
from areal_jax.rewards.config import RewardsConfig
from areal_jax.rewards.loading import record_check
from areal_jax.rewards.outcome import VerifierError
from areal_jax.rewards.pool import VerifierPool
from areal_jax.rewards.service import recipe_of
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.engine import EngineDied, WeightsRefused
from areal_jax.rollout.factory import make_engine, samplings
from areal_jax.rollout.workflows import load_workflow
from areal_jax.weights import Publisher

SHORT = {
    "model": "model",
    "data": "data.eval",
    "format": "data.format",
    "limit": "data.eval_limit",
    "samples": "controller.eval_samples_per_prompt",
    "temperature": "rollout.eval_temperature",
    "max_new_tokens": "rollout.max_new_tokens",
    "engine": "rollout.engine",
    "workflow": "rollout.workflow",
}
OWN = ("run", "config", "ks", "out", "verifier")


def settings_of(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the resolved config, the options of our own) that a command line asks for; raises `ConfigError`."""
    own: dict[str, str] = {}
    changes: list[tuple[str, str]] = []
    for word in arguments:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ConfigError(f"'{word}' is not understood; write --option=value (see --help)")
        if name in OWN:
            own[name] = value
        elif name in SHORT or name.startswith("config."):
            changes.append((SHORT.get(name, name.removeprefix("config.")), value))
        else:
            raise ConfigError(f"unknown option --{name}; known: {', '.join(f'--{n}' for n in (*OWN, *SHORT))}")
    if "run" in own and "config" in own:
        raise ConfigError("give either --run or --config")
    config = configs.default_config()
    if "run" in own:
        for key, value in configs.load(own["run"]).items():
            config[key] = ConfigDict(value) if isinstance(value, dict) else value
        config.model = str(Path(own["run"]) / "export")
    elif "config" in own:
        config = command_line.load_file(own["config"])
    for key, value in changes:
        command_line.change(config, key, value)
    if "verifier" in own:
        config.rewards.update({"verifiers": (own["verifier"],), "weights": (1.0,), "verifier_args": ({},)})
    return configs.resolve(config), own


def numbers_of(text: str) -> list[int]:
    """The whole numbers of "1,8,64"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ks={text}: write whole numbers with commas, as in --ks=1,8,64") from None


def records_of(config: dict[str, Any], tokenizer: Any) -> list[dict]:
    """The problems to evaluate, as a run chooses them."""
    if not config["data"]["eval"]:
        raise ConfigError("no data to evaluate on: give --data=FILE (data.eval)")
    say = functools.partial(print, "areal_jax.eval:", file=sys.stderr)
    return list(load_prompts("eval", config, tokenizer, check=record_check(config), tell=say))


async def evaluate(config: dict[str, Any], records: list[dict], tokenizer: Any, writer: Writer) -> list[Result]:
    """Runs the evaluation that `config` describes and closes everything; raises what engine and weights raise."""
    rollout = configs.section(RolloutConfig, config["rollout"])
    rewards = configs.section(RewardsConfig, config["rewards"])
    samples = config["controller"]["eval_samples_per_prompt"]
    workflow = load_workflow(rollout.workflow, rollout.workflow_args)
    with tempfile.TemporaryDirectory(prefix="areal_jax-eval-") as folder:
        engine = make_engine(rollout, config["model"], seed=config["seed"], workdir=folder)
        processes = min(os.cpu_count() or 1, max(4, rewards.services * rewards.processes))
        async with VerifierPool(processes, rewards.timeout) as pool:
            try:
                with Publisher(folder) as publisher:
                    await engine.start(publisher.publish(0, checkpoint_tensors(config["model"])))
                evaluator = Evaluator(
                    engine=engine,
                    workflow=workflow,
                    tokenizer=tokenizer,
                    verifier=LocalVerifier(pool, recipe_of(rewards)),
                    sampling=samplings(rollout, config["model"], tokenizer)[1],
                    data=configs.section(DataConfig, config["data"]),
                    seed=config["seed"],
                    attempts=config["controller"]["max_attempts"],
                    stop_on_failure=rewards.on_error == "stop",
                    concurrent=2 * rollout.slots,
                )
                return await evaluator.run(records, samples, Progress(len(records), writer))
            finally:
                await engine.close()


class Progress:
    """Takes each result: to its file, and as a running count to a terminal."""

    def __init__(self, total: int, writer: Writer):
        self.total, self.writer, self.done, self.right, self.scored = total, writer, 0, 0.0, 0

    def __call__(self, result: Result) -> None:
        self.writer.problem(result)
        self.done += 1
        self.right += sum(sample.accuracy for sample in result.scored)
        self.scored += len(result.scored)
        if sys.stderr.isatty():
            end = "\n" if self.done == self.total else ""
            share = f"{self.right / self.scored:.1%}" if self.scored else "-"
            print(f"\r{self.done} of {self.total} problems, accuracy {share} ", end=end, file=sys.stderr, flush=True)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """The whole program without its exit code: evaluates, writes, prints; returns the summary."""
    config, own = settings_of(arguments)
    out = Path(own["out"]) if "out" in own else Path(own["run"]) / "eval" if "run" in own else None
    if out is None:
        raise ConfigError("no folder for the results: give --out=DIR")
    if (out / PROBLEMS).exists():
        raise ConfigError(f"'{out}' holds the results of an evaluation; give another folder with --out=DIR")
    if not os.path.isdir(config["model"]):
        raise ConfigError(f"the model folder '{config['model']}' does not exist; give --model=DIR")
    validate.check_values(config)
    tokenizer = load_tokenizer(config["model"])
    free = not {"run", "config"} & own.keys() and not any("rollout.max_length" in word for word in arguments)
    if free:  # as long as it has to be
        config["rollout"]["max_length"] = sys.maxsize
    validate.check_rewards(config)
    records = records_of(config, tokenizer)
    if free:
        data = configs.section(DataConfig, config["data"])
        longest = max(len(render_prompt(record, tokenizer, data)) for record in records)
        config["rollout"]["max_length"] = longest + config["rollout"]["max_new_tokens"]
    if config["rollout"]["engine"] == "jax":  # vLLM has its own list of what it can load, and may live without jax
        validate.check_model(config)
    samples = config["controller"]["eval_samples_per_prompt"]
    ks = numbers_of(own["ks"]) if "ks" in own else [2**i for i in range(samples.bit_length())]
    if max(ks) > samples or min(ks) < 1:
        raise ConfigError(f"--ks={own.get('ks')}: every k must be between 1 and --samples={samples}")

    started, writer = time.monotonic(), Writer(out)
    try:
        results = asyncio.run(evaluate(config, records, tokenizer, writer))
    except BaseException:
        writer.close()
        raise
    about = {
        "model": config["model"],
        "data": config["data"]["eval"],
        "engine": config["rollout"]["engine"],
        "workflow": config["rollout"]["workflow"],
        "verifiers": list(config["rewards"]["verifiers"]),
        "temperature": config["rollout"]["eval_temperature"],
        "samples_per_problem": samples,
        "seconds": time.monotonic() - started,
    }
    summary = summary_of(results, ks, about)
    writer.close(summary)
    print(table(summary))
    print(f"\n{out / PROBLEMS}, {out / 'summary.json'}")
    return summary


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        summary = run(arguments)
    except (ConfigError, DataError) as error:
        print(f"areal_jax.eval: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"areal_jax.eval: {error}; use the Python that the rollout workers use", file=sys.stderr)
        return 1
    except (ValueError, OSError, EngineDied, EvaluationStopped, VerifierError, WeightsRefused) as error:
        print(f"areal_jax.eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("areal_jax.eval: stopped; problems.jsonl has what was done", file=sys.stderr)
        return 130
    return 0 if summary["samples"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything is closed and removed
    sys.exit(main(sys.argv[1:]))
