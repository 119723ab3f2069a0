"""Promise 4: each sample is trained on at most once and no prompt is lost, whichever process is killed, whenever.

A part of the matrix that `tools/fault_injection.py` tries as a whole; what is judged is in `tools/faults/harness.py`.
"""

import pytest

from tools.faults.matrix import all_faults

FAULTS = {fault.name: fault for fault in all_faults()}
KILLS = [
    "kill: controller, a batch is chosen and not yet told",
    "kill: controller, a version is accepted and not in the journal",
    "kill: controller, the report is made and not yet sent",
    "kill: rollout, a sample is done and not sent",
    "kill: rollout, during a weight load",
    "kill: rewards, judged and not yet told",
    "kill verifier: verifier, at work on an answer",
    "kill: trainer, before the first weights",
    "kill: trainer, during a checkpoint",
]

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", KILLS)
def test_a_process_killed_at_this_point_costs_time_only(survives, name):
    assert survives(FAULTS[name]).struck


def test_a_process_killed_at_a_random_moment_costs_time_only(survives):
    survives(FAULTS["kill: trainer, at a random moment"], seed=1)
