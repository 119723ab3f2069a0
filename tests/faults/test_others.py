"""What else can happen to a run: its launcher dies, processes hang, networks fail, prompts kill, guests come."""

import json

import numpy as np
import pytest

from tools.faults.harness import may_mount
from tools.faults.matrix import all_faults

FAULTS = {fault.name: fault for fault in all_faults()}

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_launcher_is_killed_nothing_stays_and_the_same_command_goes_on(survives):
    survives(FAULTS["kill parent: trainer, a batch is taken and not trained on"])


def test_the_guardian_is_killed_and_the_next_one_ends_the_run_when_the_launcher_is(survives):
    fault = FAULTS["kill: guardian, at a random moment, and the launcher once there is another"]
    assert survives(fault).started_again == {"guardian": 1}


def test_a_worker_that_hangs_is_found_and_replaced(survives):
    assert survives(FAULTS["hang: rollout, while generating"]).started_again == {"rollout-0": 1}


def test_a_controller_that_hangs_is_reported_by_the_trainer_and_replaced(survives):
    assert survives(FAULTS["hang: controller, a batch is chosen and not yet told"]).started_again == {"controller": 1}


def test_a_controller_that_hangs_before_it_can_be_found_is_replaced(survives):
    assert survives(FAULTS["hang: controller, before it can be found"]).started_again["controller"] == 1


def test_a_controller_that_stood_still_longer_than_the_heartbeat_limit_goes_on(survives):
    survives(FAULTS["stop for 9 s: controller, at a random moment"])


def test_a_prompt_that_kills_its_worker_every_time_is_put_away_and_the_others_are_trained_on(survives):
    assert survives(FAULTS["kill every time: rollout, a certain prompt is begun"]).started_again == {"rollout-0": 5}


def test_messages_that_are_lost_again_and_again(survives):
    survives(FAULTS["network: controller, messages between controller and its clients are dropped again and again"])


def test_a_controller_whose_port_was_taken_while_it_was_away_takes_another(survives):
    survives(FAULTS["port taken: controller, while it is being restarted"])


def test_a_port_that_is_taken_is_one_clear_line(survives):
    survives(FAULTS["port taken: controller, from the start"])


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a file system")
@pytest.mark.parametrize("how", ["for a while: all wait", "for longer than the limit, then there is room again"])
def test_a_disk_full_to_the_last_byte(survives, how):
    assert survives(FAULTS[f"disk full: controller, {how}"]).struck


def test_a_guard_told_to_stop_ends_the_run_at_once_says_why_and_keeps_the_batch(survives, tmp_path):
    outcome = survives(FAULTS["guard: trainer, an update beyond its limit, told to stop"])
    assert outcome.started_again == {}
    last = (tmp_path / "x" / "launcher.log").read_text().strip().splitlines()[-1]
    assert "the run failed: trainer-0 ended with exit code 70: areal_jax.trainer: TrainingStopped: step to " in last
    assert "the update was not applied: it is beyond trainer.grad_norm_limit" in last
    (batch,) = (tmp_path / "x" / "run" / "postmortem").glob("version-*.npz")
    assert last.endswith(str(batch)) and np.load(batch)["0/tokens"].any()
    assert float(json.loads(batch.with_suffix(".json").read_text())["actor/grad_norm"]) > 1e-9


def test_a_worker_may_join_and_be_killed_while_the_run_goes_on(survives):
    survives(FAULTS["guest: rollout, one more is started by hand, and ended by SIGKILL at work"])
