"""Llama, Mistral and experts: vLLM, started from our export of version 1 and given 0, is given 1 again.

The Qwen families are in test_engine and test_keep. Llama runs on two tensor parallel workers: each maps the version and
takes its share of it.
"""

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    "harness", [(family, {"weights": 1}) for family in ("mistral", "qwen3-moe")], ids=lambda p: p[0], indirect=True
)
def test_pushed_weights_score_as_the_trainer_and_equal_our_export(harness):
    harness.check_pushed_weights(1)


@pytest.mark.parametrize(
    "harness", [("llama", {"weights": 1, "engine_args": {"tensor_parallel_size": 2}})], ids=["llama"], indirect=True
)
def test_with_two_tensor_parallel_workers_every_rank_loads_every_version_in_flight_too(harness):
    harness.check_pushed_weights(1)
    assert len(harness.checksums_from_disk) == 2  # one list per rank, of its own share
    done, timings = harness.run(harness.update_in_flight(updates=2, prompt=10, new=40))
    assert len(timings) == 2 and len(np.unique(done[0][1].versions)) >= 2
    for request, completion in done[:10]:
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=1e-3)
