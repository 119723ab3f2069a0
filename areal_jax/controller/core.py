"""What the controller decides: messages and the time come in, `Send`, `Stop` and `Silent` actions collect in `outbox`.

No sockets, clock, files or threads, and the same inputs give the same outputs. `service` puts it on the network.
"""

from __future__ import annotations

from typing import Any

from areal_jax.controller import diagnosis, snapshot
from areal_jax.controller.checks import fault
from areal_jax.controller.ledger import FILTERED, Group, LedgerError, consume
from areal_jax.controller.members import Members
from areal_jax.controller.scheduling import Send, Silent, Stop
from areal_jax.disk import NO_ROOM
from areal_jax.transport import messages as m

__all__ = ["Core", "Send", "Silent", "Stop"]

_SERVICES = ("verifier_unreachable", "verifier_silent")  # what no verifier did: another try may help


def is_verifiers(error: str) -> bool:
    """Whether the error of a sample is one of a verifier (or of its sandbox) itself."""
    return error == "sandbox_unavailable" or (error.startswith("verifier_") and error not in _SERVICES)


class Core(Members):
    """The controller without its network: one method for each thing that can happen."""

    # --- Samples -----------------------------------------------------------------------------------------------------

    def sample_done(self, done: m.SampleDone, now: float) -> None:
        worker = self.fleet.workers.get(done.name)
        if done.group < 0:
            self.counters["late_results"] += not self.evaluations.done(done, worker)
            self.progress_at = now
            self._schedule(now)
            return
        group = self._running(done)
        if group is None:
            return
        worker.running.discard((done.group, done.sample))
        wrong = next(filter(None, (fault(t, self.version) for t in done.trajectories)), None)
        if wrong or not done.trajectories:
            name = "malformed_trajectory" if wrong else "empty_sample"
            self._sample_failed(group, done.sample, name, wrong or "the workflow returned no trajectory", now)
        else:
            self.progress_at, self._quarantined_in_a_row = now, 0
            self.telemetry.sample(done.trajectories)
            if self.ledger.deliver(group, done.sample, done.trajectories):
                self._group_done(group)
        self._schedule(now)

    def sample_failed(self, failure: m.SampleFailed, now: float) -> None:
        worker = self.fleet.workers.get(failure.name)
        group = self._running(failure) if failure.group >= 0 else None
        late = group is None
        if failure.group < 0:
            late = not self.evaluations.failed(failure, worker)
            self.counters["late_results"] += late
        if not late and self.stop_on_failure and is_verifiers(failure.error):
            self.failed[failure.error] += 1
            self.stop(f"rewards.on_error is 'stop', and a verification failed: {failure.error}: {failure.detail}")
            return
        if group is not None:
            worker.running.discard((failure.group, failure.sample))
            self._sample_failed(group, failure.sample, failure.error, failure.detail, now)
        self._schedule(now)

    def weights_loaded(self, loaded: m.WeightsLoaded, now: float) -> None:
        worker = self.fleet.workers.get(loaded.name)
        if worker is None or (worker.updating, worker.updating_to) != (loaded.version, loaded.published_at):
            self.counters["unexpected_weights_loaded"] += 1
            return
        worker.updating = None
        if loaded.error:
            worker.loads_failed += 1
            # A version that was overtaken on its way may be gone, since only the newest are kept: those can be loaded.
            overtaken = self.manifest is not None and self.manifest.version > loaded.version
            at_once = overtaken and worker.loads_failed == 1
            worker.retry_at = now if at_once else now + min(2.0**worker.loads_failed, 30.0)
            if overtaken:
                self.counters["overtaken_loads"] += 1
            else:
                self.failed["weights_refused"] += 1
            self.telemetry.note(f"{worker.name} could not load version {loaded.version}: {loaded.error}", now)
        else:
            worker.version, worker.loads_failed, worker.timings = loaded.version, 0, loaded.timings
            self.progress_at = now
        self._schedule(now)

    def _running(self, result: m.SampleDone | m.SampleFailed) -> Group | None:
        """The open group whose running attempt this result ends; late and repeated results are counted, not used."""
        group = self.ledger.open.get(result.group)
        if group is not None and 0 <= result.sample < len(group.samples):
            sample = group.samples[result.sample]
            if sample.worker == result.name and sample.attempt == result.attempt:
                return group
            if sample.trajectories is not None:
                self.counters["duplicate_results"] += 1
                return None
        self.counters["late_results"] += 1
        return None

    def _group_done(self, group: Group) -> None:
        if self.config.dynamic_filter and group.uninformative:
            self.ledger.end(group.prompt, FILTERED)
            self.counters["filtered"] += 1
            self._filtered_in_a_row += 1
            if self._filtered_in_a_row >= max(len(self.records), 8 * self.config.batch_size):
                self.stop(
                    f"the last {self._filtered_in_a_row} groups were all filtered, as many as the data has prompts "
                    f"({len(self.records)}) or more: all samples of a prompt get the same reward. Check the verifier, "
                    f"use easier (or harder) prompts or a larger group_size, or turn dynamic_filter off"
                )
            return
        self._filtered_in_a_row = 0
        self.buffer.add(group)
        self.just_finished.append(group)
        if self.next_batch - group.oldest > self.config.max_staleness:
            self._drop([group])

    def _sample_failed(self, group: Group, i: int, error: str, detail: str, now: float) -> None:
        self.failed[error] += 1
        group.prompt.failures += 1
        group.samples[i].failures += 1
        tries = group.samples[i].failures
        self.telemetry.note(f"{error} in sample {i} of record {group.prompt.index} (try {tries}): {detail}", now)
        if tries < self.config.max_attempts:
            self.ledger.unassign(group, i, now + min(0.25 * 2.0**tries, 10.0))
            return
        self._quarantine(group, f"{tries} tries of sample {i} failed, at last by {error}: {detail}")
        self._quarantined_in_a_row += 1
        many = max(8, self.config.batch_size)
        if self.stop_on_failure or self._quarantined_in_a_row >= many:
            self.stop(
                f"{self._quarantined_in_a_row} prompts in a row failed {self.config.max_attempts} times each, and no "
                f"sample succeeded in between; the last error: {error}: {detail}"
            )

    # --- The trainer -----------------------------------------------------------------------------------------------

    def get_batch(self, version: int, now: float) -> m.Batch | m.NotReady | m.Refused:
        """The batch of training step `version`; the same one however often it is asked for. Empty: no data is left."""
        if self.stopped:
            return m.Refused(reason=self.stopped)
        if version in self.handed:
            return self.handed[version]
        if self.version < 0:
            return m.Refused(reason="no weights are published yet: send Publish before GetBatch")
        if version != self.next_batch:
            return m.Refused(reason=f"the next batch is {self.next_batch}, not {version}")
        if version > self.version + 1:
            return m.Refused(reason=f"publish version {version - 1} before asking for batch {version}")
        chosen = self._choose()
        if chosen is None:
            return m.NotReady(waiting_for=diagnosis.waiting_for(self, now))
        self.progress_at = now
        depth = len(self.buffer)
        self.buffer.take(chosen)
        for group in chosen:
            if version - group.oldest > self.config.max_staleness:
                raise LedgerError(f"group {group.number} is {version - group.oldest} versions old in batch {version}")
        report = self.telemetry.batch(self, version, chosen, depth, now)
        batch = m.Batch(version=version, groups=[group.result() for group in chosen], report=report)
        self.handed[version], self.handed_groups[version] = batch, chosen
        self.next_batch += 1
        self.telemetry.training_began(now)
        self._expire()
        self._schedule(now)
        return batch

    def _choose(self) -> list[Group] | None:
        if stale := self.buffer.over_age(self.next_batch):
            self._drop(stale)
        if self.ledger.exhausted() and not self.ledger.open:  # the last batch may be short
            size = min(self.config.batch_size, len(self.buffer))
        else:
            size = self.config.batch_size
        return self.buffer.choose(self.next_batch, self.ledger.open.values(), size)

    def publish(self, manifest: m.Manifest, now: float) -> m.Published | m.Refused:
        """Version `manifest.version` exists, and the batch before it is consumed for good."""
        if self.stopped:
            return m.Refused(reason=self.stopped)
        version, follows = manifest.version, manifest.version == self.version + 1
        if self.version < 0:
            if self.next_batch not in (0, version) or version < 0:
                return m.Refused(reason=f"the state restored is that of step {self.next_batch}, not of {version}")
            self.next_batch = version
        elif follows and self.version in self.handed:
            del self.handed[self.version]
            groups = self.handed_groups.pop(self.version)
            consume(self.ledger, self.counters, groups)
            self.telemetry.consumed(self.version, groups)
        elif version == 0 < self.version:  # the trainer was started again, before there was a checkpoint
            snapshot.begin_again(self, self.new_ledger(), 0)
            for counts in (self.counters, self.failed, self.telemetry.lags, self.telemetry.token_lags):
                counts.clear()
            self.next_batch = version
        elif version != self.version:
            why = "its batch was not taken" if follows else "send SetState with that checkpoint's state first"
            return m.Refused(reason=f"version {version} cannot follow version {self.version}: {why}")
        self.version, self.manifest, self.progress_at = version, manifest, now
        self.telemetry.published(now)
        self.evaluations.published(manifest)
        self._expire()
        self._schedule(now)
        return m.Published(version=version)

    def get_state(self, version: int) -> m.State | m.Refused:
        """Everything to go on from training step `version`: batches before it count as consumed, later ones do not."""
        if not max(self.version, 0) <= version <= self.next_batch:
            return m.Refused(
                reason=f"the state of step {version} cannot be had: version {self.version} is published and batch "
                f"{self.next_batch} comes next; ask before the version after {version} is published"
            )
        return m.State(version=version, data=snapshot.save(self, version))

    def set_state(self, state: m.SetState, now: float) -> m.Published | m.Refused:
        """Go on from `state`, and keep finished groups that it has in flight, if they are fresh. Publish next."""
        try:
            snapshot.restore(self, state.version, state.data)
        except snapshot.StateError as error:
            return m.Refused(reason=str(error))
        self.progress_at = now
        return m.Published(version=state.version)

    def finish(self, now: float) -> dict[str, Any]:
        """The run is over: everybody shuts down, and this is the final report."""
        if not self.finished:
            self.finished = True
            self.shutdown("the run is over")
        return self.telemetry.final(self, now)

    def status(self, now: float) -> dict[str, Any]:
        """A picture of this moment, for the live view."""
        return self.telemetry.status(self, now)

    def evaluate(self, version: int, now: float) -> m.EvaluationResult | m.NotReady | m.Refused:
        """Run the evaluation set on exactly `version`; asking again polls. Training and generation go on meanwhile."""
        if self.stopped:
            return m.Refused(reason=self.stopped)
        reply = self.evaluations.request(version, self.manifest)
        if reply is None:
            self._schedule(now)
            reply = m.NotReady(waiting_for=diagnosis.evaluation(self, now))
        return reply

    # --- Time ------------------------------------------------------------------------------------------------------

    def overslept(self, seconds: float, now: float) -> None:
        """This process itself did nothing for so long: nobody is to blame for what was not heard meanwhile."""
        for party in (*self.telemetry.parties.values(), *self.missing.values()):
            party.heard = min(now, party.heard + seconds)
        self.progress_at = min(now, self.progress_at + seconds)
        self.telemetry.note(f"the controller itself stood still for {seconds:.0f} s", now)

    def trainer_without_room(self) -> bool:
        """Whether a trainer says that it waits for room on its disk."""
        return any(party.role == "trainer" and party.phase == NO_ROOM for party in self.telemetry.parties.values())

    def held_up(self, now: float) -> None:
        """Nothing moves just now for a reason that has a limit of its own."""
        self.progress_at = now

    def tick(self, now: float) -> None:
        """Time passes: find the dead, retry what failed, and end a run in which nothing moves."""
        if self.stopped or self.finished:
            return
        for party in self.telemetry.silent(now, self.config.heartbeat_limit):
            if party.role in ("rollout", "rewards"):
                self.missing[party.name] = party
            if party.name in self.fleet.workers:
                self._lose(party.name, now, died=True, claimable=True, why=f"was silent for {now - party.heard:.0f} s")
        for party in list(self.missing.values()):
            if (silent := now - party.heard) > 2 * self.config.heartbeat_limit:
                del self.missing[party.name]
                self.outbox.append(Silent(party.name, party.host, party.pid, silent, party.phase))
        self._schedule(now)
        if now - self.progress_at > self.config.progress_limit:
            self.stop(
                f"no sample finished and no batch was taken for {now - self.progress_at:.0f} s "
                f"(controller.progress_limit); waiting for {diagnosis.waiting_for(self, now)}"
            )
