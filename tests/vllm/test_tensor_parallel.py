"""Two tensor parallel workers: each maps the version and takes its share; spans stay right while weights change."""

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    "harness", [("qwen3", {"engine_args": {"tensor_parallel_size": 2}})], ids=["qwen3"], indirect=True
)
def test_both_ranks_load_every_version(harness):
    done, timings = harness.run(harness.update_in_flight(updates=2, prompt=10, new=40))
    assert len(timings) == 2 and len(np.unique(done[0][1].versions)) >= 2
    for request, completion in done[:10]:
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=1e-3)
