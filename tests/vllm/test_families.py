"""Every family: what vLLM computes after a *pushed* update is what the trainer computes, and what a reload would give."""

import jax.numpy as jnp
import numpy as np
import pytest

from areal_jax import models

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    "harness", [(family, {}) for family in ("qwen2", "qwen3", "llama", "mistral", "qwen3-moe")], indirect=True
)
def test_pushed_weights_score_as_the_trainer_and_as_a_checkpoint(harness, tmp_path):
    harness.update(1)
    requests = [harness.request(40, 100, seed=i, temperature=0.8) for i in range(4)]
    for request in requests:
        completion = harness.run(harness.engine.generate(request))
        assert (completion.versions == 1).all()
        np.testing.assert_allclose(completion.logprobs, harness.rescore(request, completion), atol=1e-3)

    greedy = harness.request(40, 30, temperature=0.0)
    pushed = harness.run(harness.engine.generate(greedy))
    checksums = harness.run(harness.engine._llm.compute_weight_checksums())
    harness.update(2)
    assert harness.run(harness.engine._llm.compute_weight_checksums()) != checksums

    # vLLM's own loader reads our export of version 1 from disk.
    exported = tmp_path / "export"
    models.export_hf(harness.model, harness.params(1), exported, source=harness.checkpoint, dtype=jnp.float32)
    harness.run(harness.engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(exported)}))
    assert harness.run(harness.engine._llm.compute_weight_checksums()) == checksums
    harness.update(1)
    assert harness.run(harness.engine._llm.compute_weight_checksums()) == checksums
    again = harness.run(harness.engine.generate(greedy))
    np.testing.assert_array_equal(again.tokens, pushed.tokens)
    np.testing.assert_array_equal(again.logprobs, pushed.logprobs)
