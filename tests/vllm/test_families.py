"""Every family: after a *pushed* update vLLM computes what the trainer does, and what our export on disk would give."""

import numpy as np
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    "harness",
    [(family, {"weights": 1}) for family in ("qwen2", "qwen3", "llama", "mistral", "qwen3-moe")],
    ids=lambda p: p[0],
    indirect=True,
)
def test_pushed_weights_score_as_the_trainer_and_equal_our_export(harness):
    """vLLM started from our export of version 1, was then given version 0, and is now given version 1.

    Checksums are of vLLM's parameters. On CPU those of linear layers live elsewhere, in packed form: of them the scores
    speak.
    """
    assert harness.run(harness.engine._llm.compute_weight_checksums()) != harness.checksums_from_disk
    harness.update(1)
    assert harness.run(harness.engine._llm.compute_weight_checksums()) == harness.checksums_from_disk
    for request in [harness.request(40, 100, seed=i, temperature=0.8) for i in range(4)]:
        completion = harness.run(harness.engine.generate(request))
        assert (completion.versions == 1).all()
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=1e-3)
