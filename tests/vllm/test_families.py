"""Llama, Mistral and experts: vLLM, started from our export of version 1 and given 0, is given 1 again.

The Qwen families are in test_engine.
"""

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize(
    "harness",
    [(family, {"weights": 1}) for family in ("llama", "mistral", "qwen3-moe")],
    ids=lambda p: p[0],
    indirect=True,
)
def test_pushed_weights_score_as_the_trainer_and_equal_our_export(harness):
    harness.check_pushed_weights(1)
