"""Synchronous RL as a plain loop in one process: generate, score, train, in turn. The oracle of the η = 0 mode.

    python tests/integration/plain_loop.py WORKDIR OUT

repeats the run in WORKDIR (its config.json) without controller, sockets, processes or published weights, and writes the
losses of each step to OUT/steps.json and the final checkpoint to OUT/export. Dispatch length and order of requests
differ from the run's on purpose: they must not matter. The number of slots is the same: it is the shape of the engine's
products, which decides the order of their sums.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from transformers import AutoTokenizer

from areal_jax import config as configs
from areal_jax import models
from areal_jax.controller.config import ControllerConfig
from areal_jax.data.config import DataConfig
from areal_jax.data.order import epoch_order
from areal_jax.data.readers import load_dataset
from areal_jax.rewards import verify_math
from areal_jax.rollout.config import RolloutConfig
from areal_jax.rollout.factory import samplings
from areal_jax.rollout.jax_engine import JaxEngine
from areal_jax.rollout.session import Session
from areal_jax.rollout.workflows import SingleTurn
from areal_jax.trainer import learner
from areal_jax.trainer.advantages import AdvantageEstimator
from areal_jax.trainer.batch import make_batch
from areal_jax.trainer.config import TrainerConfig
from areal_jax.transport.messages import GroupResult, Manifest, Score, Task


class Recipe:
    """Scores in this process: the run's one verifier, scaled and shifted as its settings say."""

    def __init__(self, settings: dict):
        self.scale, self.offset = settings["scale"], settings["offset"]
        self.arguments = settings["verifier_args"][0]

    async def verify(self, record, prompt, completion, prompt_tokens, completion_tokens):
        accuracy = verify_math(completion, record["answer"], **self.arguments)
        return Score(request=0, reward=(accuracy + self.offset) * self.scale, metrics={"accuracy": accuracy})


def main(workdir: str, out: str) -> None:
    config = configs.load(workdir)
    os.environ.update(config["launch"]["env"])  # the number of XLA's threads decides how sums are split
    control = configs.section(ControllerConfig, config["controller"])
    rollout = configs.section(RolloutConfig, config["rollout"])
    train = configs.section(TrainerConfig, config["trainer"])
    data = configs.section(DataConfig, config["data"])
    dataset = load_dataset(data.train, data)
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    sampling, _ = samplings(rollout, config["model"], tokenizer)

    mesh = learner.mesh_of(train)
    model, params = models.load_hf(
        config["model"], mesh=mesh, param_dtype=train.param_dtype, compute_dtype=train.compute_dtype
    )
    pupil = learner.Learner(
        model, params, train, mesh=mesh, temperature=rollout.temperature,
        objective=learner.make_objective(train, horizon=float(rollout.max_new_tokens)),
    )  # fmt: skip
    samples = control.batch_size * control.group_size
    estimator = AdvantageEstimator(train.advantage, train.advantage_args, control.batch_size, samples, train.row_length)
    player = models.Model(model.config, compute_dtype=rollout.dtype)
    engine = JaxEngine(
        player,
        lambda _: (jax.tree.map(jnp.copy, pupil.state.params), {}),  # straight from the trainer
        slots=rollout.slots,  # the shape of its products; what is in them must not matter
        max_length=rollout.max_length,
        steps_per_dispatch=5,
        exact=True,
    )
    verifier = Recipe(config["rewards"])

    async def generate(version: int) -> list[GroupResult]:
        async def sample(number: int, record: dict, i: int):
            session = Session(
                engine=engine, tokenizer=tokenizer, verifier=verifier, sampling=sampling, data=data,
                task=Task(group=number, sample=i, record=record), seed=config["seed"],
            )  # fmt: skip
            return await SingleTurn().run(session, record)

        jobs = []
        for number in range(version * control.batch_size, (version + 1) * control.batch_size):
            epoch, place = divmod(number, len(dataset))
            index = int(epoch_order(len(dataset), config["seed"], epoch, control.shuffle)[place])
            jobs += [(number, index, epoch, i) for i in range(control.group_size)]
        backwards = reversed(jobs)
        done = await asyncio.gather(*(sample(number, dataset[index], i) for number, index, _, i in backwards))
        found = dict(zip(reversed(jobs), done, strict=True))
        return [
            GroupResult(group=number, record_index=index, epoch=epoch,
                        samples=[found[(number, index, epoch, k)] for k in range(control.group_size)])
            for number, index, epoch, i in jobs if i == 0
        ]  # fmt: skip

    async def loop() -> list[dict]:
        reports = []
        for version in range(train.steps):
            manifest = Manifest(version=version, nbytes=0, tensors=[], path="", host="")
            await (engine.update_weights(manifest) if version else engine.start(manifest))
            batch = make_batch(await generate(version), version, estimator, max_staleness=0)
            reports.append(pupil.step(batch).report())
        await engine.close()
        return reports

    reports = asyncio.run(loop())
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [{k: v for k, v in report.items() if isinstance(v, (int, float))} for report in reports]
    (folder / "steps.json").write_text(json.dumps(numbers))
    models.export_hf(model, pupil.state.params, folder / "export", source=config["model"], dtype=train.publish_dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
