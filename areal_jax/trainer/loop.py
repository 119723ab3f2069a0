"""The story of one training run, from the first weights to the exported checkpoint; read `Training.run` top to bottom.

Every process of the trainer runs the same story on the same batches. Process 0 alone publishes, writes and decides.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from areal_jax import models
from areal_jax.controller.config import ControllerConfig
from areal_jax.disk import NO_ROOM, insist, no_waiting, write_whole
from areal_jax.metrics.clock import Clock, idle_fraction, trace_path
from areal_jax.metrics.config import MetricsConfig
from areal_jax.metrics.trained import TrainedWriter
from areal_jax.metrics.writers import MetricsWriter
from areal_jax.models import Lora, Model, ModelConfig
from areal_jax.rollout.config import RolloutConfig
from areal_jax.trainer import distributed, flops, learner, measure, state
from areal_jax.trainer.advantages import AdvantageEstimator
from areal_jax.trainer.batch import make_batch
from areal_jax.trainer.checkpoint import Checkpoints
from areal_jax.trainer.config import TrainerConfig
from areal_jax.trainer.guards import Guard
from areal_jax.trainer.heap import Heap
from areal_jax.trainer.learner import Learner, Pending
from areal_jax.trainer.link import BackgroundEvaluation, BackgroundPublisher, Link, Stopped
from areal_jax.trainer.steps import CompileCounter
from areal_jax.transport import messages as m

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a run's settings that the trainer needs; made from the config by `__main__`."""

    name: str
    model: str  # folder of the Hugging Face checkpoint that the run begins with
    evaluates: bool  # there is evaluation data
    trainer: TrainerConfig
    controller: ControllerConfig
    rollout: RolloutConfig
    metrics: MetricsConfig
    config: dict[str, Any]  # the whole config, kept in checkpoints


class Training:
    """One process's part in a run.

    Args:
      settings: of the run.
      workdir: its folder.
      process: this JAX process, 0 .. settings.trainer.processes - 1.
      told_to_stop: whether the process was told to end; asked between steps and while waiting.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: str | os.PathLike,
        process: int = 0,
        told_to_stop: Callable[[], bool] = lambda: False,
    ):
        self.settings, self.workdir, self.process = settings, Path(workdir), process
        self.first = process == 0
        self.clock = Clock("starting", trace=trace_path(workdir, f"trainer-{process}"))
        self._told_to_stop = told_to_stop
        self.reply_limit = 4 * settings.controller.heartbeat_limit  # as long as workers wait for a controller
        self.memory: dict[str, Any] = {"config": settings.config, "wall_seconds": 0.0, "trained_tokens": 0}
        self._asked = -1  # the version whose evaluation was begun last
        self.pending: tuple[Pending, dict[str, Any]] | None = None
        self.saves_failed, self.save_problem = 0, ""
        self.evaluation: BackgroundEvaluation | None = None  # beside training
        self.idle_from: dict[str, float] = {}  # the clock when training began
        self.heap = Heap()

    # -- the story -------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains until the last step, or until told to stop; whether the run is finished."""
        c = self.settings.trainer
        with contextlib.ExitStack() as self.held:
            beat, patience = self.settings.controller.heartbeat_seconds, 2 * self.settings.controller.disk_limit
            options = {"heartbeat_seconds": beat, "limit": self.reply_limit, "patience": patience}
            options |= {"told_to_stop": self._told_to_stop, "agree": distributed.agree}
            self.link = self.held.enter_context(Link(self.workdir, self.process, self.clock, **options))
            self.start()
            try:
                self.begin()
                while self.learner.version < c.steps:
                    message = self.link.batch(self.learner.version, c.batch_timeout)
                    if not message.groups:
                        log.info("the data is used up after %d steps", self.learner.version)
                        break
                    self.step(message)
                    if c.checkpoint_every and self.learner.version % c.checkpoint_every == 0:
                        self.flush_report()  # a run that goes on from there would never write it
                        self.save()
                self.end()
                return True
            except Stopped as stop:
                log.warning("told to stop %s; saving version %d", stop, self.learner.version)
                self.flush_report()
                self.save(wait=True)
                return False

    def start(self) -> None:
        """Loads the model, or everything from the newest checkpoint; compiles nothing yet."""
        s, c = self.settings, self.settings.trainer
        self.compiles = CompileCounter()
        self.mesh = learner.mesh_of(c)
        options = {"compute_dtype": c.compute_dtype, "attention": c.attention, "remat": c.remat}
        options |= {"layers": c.layers, "max_segments": learner.max_segments(c)}
        options["lora"] = Lora(c.lora_rank) if c.lora_rank else None
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", c.keep_checkpoints)
        self.held.callback(self.checkpoints.close)
        self.restored = None
        if self.checkpoints.latest() is None:
            model, params = models.load_hf(s.model, mesh=self.mesh, param_dtype=c.param_dtype, **options)
        else:
            model, params = Model(ModelConfig.from_hf(s.model), mesh=self.mesh, **options), None
            abstract = model.abstract_params(c.param_dtype)
            self.restored = self.checkpoints.restore(state.abstract(abstract, state.make_optimizer(c), self.mesh))
            self.memory |= {k: v for k, v in self.restored.memory.items() if k != "config"}
            log.info("going on from the checkpoint of version %d", int(self.restored.state.version))
        reference = None
        if c.kl_coef:
            base = {**options, "lora": None}
            reference = models.load_hf(s.model, mesh=self.mesh, param_dtype=c.param_dtype, **base)[1]
        self.learner = Learner(
            model,
            params,
            c,
            mesh=self.mesh,
            objective=learner.make_objective(c, horizon=float(s.rollout.max_new_tokens)),
            reference=reference,
            temperature=s.rollout.temperature or 1.0,
            train_state=self.restored.state if self.restored else None,
        )
        batch = s.controller.batch_size
        samples = batch * s.controller.group_size
        self.estimator = AdvantageEstimator(c.advantage, c.advantage_args, batch, samples, c.row_length)
        skipped = self.memory.get("skipped_updates", 0)  # before this process
        self.guard = Guard(self.workdir if self.first else None, c.guard, c.equal_rewards_limit, skipped=skipped)
        self.publisher = self.writer = self.trained = None
        if self.first:
            options = {"transport": c.weights_transport, "address": s.controller.address, "limit": self.reply_limit}
            options |= {"patience": 2 * s.controller.disk_limit, "insist": lambda f: self.insist(f, "publisher")}
            self.publisher = BackgroundPublisher(self.workdir, **options)
            self.held.callback(self.publisher.close)
            metrics = (s.metrics.tensorboard, s.metrics.wandb)
            self.writer = self.held.enter_context(MetricsWriter(self.workdir, *metrics, name=s.name, config=s.config))
            self.trained = self.held.enter_context(TrainedWriter(self.workdir))

    def begin(self) -> None:
        """Publishes the first weights, has them evaluated, and meanwhile compiles the training step."""
        version = self.learner.version
        if self.first and self.restored is not None:
            self.link.settle(m.SetState(version=version, data=self.restored.controller))
        self.restored = None
        self.publish(wait=True)
        evaluate = self.settings.evaluates and "accuracy_before" not in self.memory
        if evaluate:
            self.link.request(m.Evaluate(version=version))
        with self.clock.phase("compiling"):
            self.estimator([], [])
            self.learner.warm_up(self.settings.controller.batch_size * self.settings.controller.group_size)
        if evaluate:
            self.memory["accuracy_before"] = self.evaluate(version)
        distributed.agree(True, False)  # compiled now, not in the first step
        self.compiles.restart()
        self._step_ended = self.clock.totals()

    def step(self, message: m.Batch) -> None:
        """One training step: advantages, pack, proximal log-probs, update, and the new version on its way."""
        started = time.perf_counter()
        if not self.idle_from:
            self.idle_from = self.clock.totals()
        self.clock.enter("training")
        bound = self.settings.controller.max_staleness
        batch = make_batch(message.groups, message.version, self.estimator, max_staleness=bound)
        pending = self.learner.step(batch, before_update=self.wait_for_publisher)
        self.note_evaluation()  # of the version before, which is published by now
        self.note_failed_saves()
        self.flush_report()  # of the step before, while this one is computed
        jax.block_until_ready(self.learner.state.version)
        self.heap.tidy()
        if self.trained is not None:
            self.insist(lambda: self.trained.write(message.version, message.groups))
        self.publish()
        seconds = time.perf_counter() - started
        self.memory["trained_tokens"] += batch.report.get("batch/trained_tokens", 0)
        lengths, rank = [len(s.tokens) for s in batch.samples], self.settings.trainer.lora_rank
        speed = flops.speed(self.learner.model.config, lengths, seconds, rank)
        self.pending = (pending, dict(message.report) | self._times(seconds) | speed)
        self.link.counters = {"steps": self.learner.version, "trained_tokens": self.memory["trained_tokens"]}
        self.link.gauges = {"version": self.learner.version}
        self.clock.enter("idle")

    def end(self) -> None:
        """Last report, evaluation, checkpoint, export, and the summary."""
        self.flush_report()
        compiled = self.compiles.count
        idle = _since(self.clock.totals(), self.idle_from)
        self.wait_for_publisher()
        limit = self.settings.trainer.batch_timeout
        self.link.until(lambda: self.evaluation.poll() if self.evaluation else None, 2 * limit, "evaluation")
        self.note_evaluation()
        version = self.learner.version
        if self.settings.evaluates:
            self.memory["accuracy_after"] = self.evaluate(version)
        self.insist(lambda: self.save(wait=True))
        with self.clock.phase("exporting"):
            self.insist(self.export)
        if not self.first:
            return
        final = self.link.request(m.Finish())
        summary = dict(final.data) if isinstance(final, m.Status) else {}
        summary |= {
            "name": self.settings.name,
            "steps": version,
            "accuracy_before": self.memory.get("accuracy_before"),
            "accuracy_after": self.memory.get("accuracy_after"),
            "wall_seconds": self.memory["wall_seconds"] + self.clock.age(),
            "trained_tokens": self.memory["trained_tokens"],
            "max_staleness": max(self.memory.get("max_staleness", 0), summary.get("max_staleness", 0)),
            "worst_mismatch": self.memory.get("worst_mismatch"),
            "recompiles_after_warmup": compiled,
            "trainer_idle_fraction": idle_fraction(idle),
            "trainer_seconds": idle,
            "skipped_updates": self.guard.skipped,
            "checkpoints_failed": self.saves_failed,
        }
        text = json.dumps(summary, indent=1) + "\n"
        self.insist(lambda: write_whole(self.workdir / "summary.json", text))

    # -- its parts -------------------------------------------------------------------------------------------------

    def publish(self, *, wait: bool = False) -> None:
        """Sends the current weights on their way; with several processes all gather, so that they must wait."""
        dtype, version = self.settings.trainer.publish_dtype, self.learner.version
        model, params = self.learner.model, self.learner.state.params

        def tensors(measured: dict[str, float]) -> Iterator:
            return models.to_hf(model, params, dtype, timings=measured)

        if jax.process_count() > 1 or wait:
            with self.clock.phase("publishing"):
                if self.publisher is not None:
                    self.publisher.publish(version, tensors)
                else:
                    for _ in tensors({}):  # takes part in the gathering
                        pass
                distributed.agree(True, False)  # nobody goes on before the controller knows
        elif self.publisher is not None:
            self.publisher.start(version, tensors)

    def wait_for_publisher(self) -> None:
        """Until nobody reads the old parameters any more."""
        if self.publisher is not None:
            with self.clock.phase("waiting:publisher"):
                self.publisher.join()

    def flush_report(self) -> None:
        """Writes the report of the last step that has none yet, and lets the guard judge it."""
        if self.pending is None:
            return
        (pending, extra), self.pending = self.pending, None
        report = pending.report() | extra | {"checkpoint/failed": self.saves_failed}
        staleness = report.get("staleness/max", 0)
        self.memory["max_staleness"] = max(self.memory.get("max_staleness", 0), int(staleness))
        if (mismatch := report.get("mismatch/logprob_abs_diff_mean")) is not None:
            self.memory["worst_mismatch"] = max(mismatch, self.memory.get("worst_mismatch") or 0.0)
        dtype, restricted = self.settings.trainer.compute_dtype, self.settings.rollout.restricted
        if warning := measure.diagnose(report, compute_dtype=dtype, restricted=restricted):
            report["warning"] = warning
            log.warning("version %d: %s", pending.version, warning)
        elif self.save_problem:
            report["warning"], self.save_problem = self.save_problem, ""
        elif self.first and self.writer.problem:
            report["warning"] = self.writer.problem
        if self.publisher is not None:
            report |= self.publisher.timings
        try:
            if problem := self.guard.judge(pending.version, report, pending.packed):
                report["problem"] = problem
                log.warning("version %d: %s", pending.version, problem)
        finally:
            self.memory["skipped_updates"] = self.guard.skipped
            if self.first:
                self.writer.write(pending.version, report)

    def insist(self, write: Callable[[], Any], part: str = "trainer") -> Any:
        """Writes what the run cannot do without: a full disk is waited for, while nothing is trained on, and the
        controller is told. `part`: of this process; only "trainer" is its main thread, whose time is counted.

        Raises:
          DiskFull: after `controller.disk_limit` seconds; with several processes at once, as the others cannot wait.
        """
        if jax.process_count() > 1:
            with no_waiting():
                return write()

        def pause(seconds: float) -> None:
            with self.clock.phase(NO_ROOM):
                time.sleep(seconds)

        limit, sleep = self.settings.controller.disk_limit, pause if part == "trainer" else time.sleep
        tell = functools.partial(self.link.no_room.__setitem__, part)
        return insist(write, limit, stop=self._told_to_stop, tell=tell, sleep=sleep)

    def export(self) -> None:
        """The Hugging Face checkpoint of the present weights."""
        learner, dtype = self.learner, self.settings.trainer.publish_dtype
        folder, source = self.workdir / "export", self.settings.model
        models.export_hf(learner.model, learner.state.params, folder, source=source, dtype=dtype, overwrite=True)

    def _times(self, seconds: float) -> dict[str, float]:
        """Where the time since the end of the last step went; `seconds` is this step's own."""
        now = self.clock.totals()
        spent, self._step_ended = _since(now, self._step_ended), now
        return {
            "time/train": seconds,
            "time/step": sum(spent.values()),
            "time/wait_for_batch": spent.get("waiting:batch", 0.0),
            "time/wall": self.memory["wall_seconds"] + sum(now.values()),
            "idle/trainer": idle_fraction(spent),
            "perf/compilations": self.compiles.count,
        }

    def evaluate(self, version: int) -> float | None:
        """Accuracy on the evaluation set under exactly this version; all processes wait for it."""
        limit = self.settings.trainer.batch_timeout
        return self._record(self.link.wait(m.Evaluate(version=version), limit, "evaluation"))

    def note_evaluation(self) -> None:
        """Records the evaluation that ran beside training, if it has ended; begins the one that is due."""
        c = self.settings.trainer
        if not (self.first and self.settings.evaluates and c.eval_every):
            return
        if self.evaluation is not None and not self.evaluation.running:
            ended, self.evaluation = self.evaluation, None
            if ended.result is not None:
                self._record(ended.result)
            else:
                log.warning("version %d was not evaluated: %s", ended.version, ended.problem)
        published = self.publisher.manifest.version
        due = published % c.eval_every == 0 and 0 < published < c.steps
        if due and published != self._asked:
            self._asked = published
            if self.evaluation is not None:
                log.warning("version %d is not evaluated: version %d still is", published, self.evaluation.version)
                return
            self.evaluation = BackgroundEvaluation(self.workdir, published, c.batch_timeout, self.reply_limit)
            self.held.callback(self.evaluation.close)

    def _record(self, result: m.EvaluationResult) -> float | None:
        found = {"eval/samples": result.samples, "eval/failed": result.failed}
        found |= {} if result.accuracy is None else {"eval/accuracy": result.accuracy}
        if self.first:
            self.writer.write(result.version, found | {f"eval/{name}": x for name, x in result.metrics.items()})
        log.info("version %d: accuracy %s, %d samples", result.version, result.accuracy, result.samples)
        return result.accuracy

    def save(self, *, wait: bool = False) -> None:
        """A checkpoint of this moment: training state, and the controller's as of the same step."""
        with self.clock.phase("checkpointing"):
            if self.publisher is not None:
                self.publisher.join()
            controller = self.link.request(m.GetState(version=self.learner.version))
            memory = self.memory | {"wall_seconds": self.memory["wall_seconds"] + self.clock.age()}
            self.checkpoints.save(self.learner.state, controller.data, memory, wait=wait)
        self.note_failed_saves()

    def note_failed_saves(self) -> None:
        """A checkpoint that could not be written is no reason to end: the one before is whole, the next may succeed."""
        self.checkpoints.poll()
        for problem in self.checkpoints.failed:
            self.save_problem = f"{problem}; going on, the newest checkpoint is of version {self.checkpoints.latest()}"
            log.warning("%s", self.save_problem)
        self.saves_failed += len(self.checkpoints.failed)
        self.checkpoints.failed.clear()


def _since(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {phase: seconds - before.get(phase, 0.0) for phase, seconds in now.items()}
