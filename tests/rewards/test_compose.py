"""Weights, scaling and penalties make the trained reward; the accuracy stays what the first verifier said."""

import asyncio

import pytest

from areal_jax.rewards import Failure, Score, VerifierError, VerifierPool
from areal_jax.rewards.compose import Recipe, Verifier, combine, judge
from areal_jax.rewards.shaping import format_penalty, overlong_penalty

MATH = Verifier(path="areal_jax.rewards:verify_math")
FORMAT = Verifier(path="areal_jax.rewards.shaping.format_penalty", weight=0.5)


def score(reward, **values):
    return Score(reward=reward, accuracy=reward, values=values)


@pytest.mark.parametrize(("right", "reward"), [(1.0, 5.0), (0.0, -5.0)])
def test_areals_plus_and_minus_five(right, reward):
    recipe = Recipe(verifiers=(MATH,), scale=10.0, offset=-0.5)
    combined = combine([score(right)], recipe, length=7)
    assert combined.reward == reward and combined.accuracy == right and combined.values == {}


def test_overlong_penalty_is_daposs():
    lengths = [0, 16384, 18432, 20480, 30000]  # max 20480, buffer 4096
    assert [overlong_penalty(n, max_length=20480, buffer=4096) for n in lengths] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert overlong_penalty(10**9, max_length=0, buffer=0) == 0.0
    with pytest.raises(ValueError, match="between 1 and max_length=10"):
        overlong_penalty(1, max_length=10, buffer=11)


def test_weights_penalties_and_scaling_by_hand():
    recipe = Recipe(
        verifiers=(MATH, FORMAT), scale=2.0, offset=1.0, overlong_max=100, overlong_buffer=50, overlong_factor=0.4
    )
    combined = combine([score(1.0, passed=3.0), score(-1.0, tags=2.0)], recipe, length=75)
    assert combined.reward == pytest.approx((1.0 * 1.0 + 0.5 * -1.0 + 0.4 * -0.5 + 1.0) * 2.0)
    assert combined.accuracy == 1.0
    assert combined.values == {
        "passed": 3.0,
        "overlong_penalty": -0.5,
        "verify_math/reward": 1.0,
        "format_penalty/reward": -1.0,
        "format_penalty/accuracy": -1.0,
        "format_penalty/tags": 2.0,
    }


def test_recipes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Recipe(verifiers=())
    with pytest.raises(ValueError, match="same name"):
        Recipe(verifiers=(MATH, MATH))
    with pytest.raises(ValueError, match="between 1 and"):
        Recipe(verifiers=(MATH,), overlong_max=10)


@pytest.mark.parametrize(
    ("completion", "penalty"),
    [
        ("<think>a\nb</think>\n3", 0.0),
        ("<think>a</think> ", -1.0),
        ("a </think> b </think> c", -1.0),
        ("3", -1.0),
    ],
)
def test_format_penalty(completion, penalty):
    assert format_penalty(completion) == penalty
    with pytest.raises(VerifierError, match="not a regular expression"):
        format_penalty(completion, pattern="(")


def test_verifiers_run_together_in_the_pool_and_one_failure_makes_no_reward():
    fields = {
        "prompt": "1+1?",
        "completion": "<think>2</think> \\boxed{2}",
        "answer": "2",
        "prompt_tokens": [1],
        "completion_tokens": [1] * 60,
    }
    good = Recipe(verifiers=(MATH, FORMAT), scale=10.0, offset=-0.5, overlong_max=100, overlong_buffer=50)
    pattern = Verifier(path=FORMAT.path, weight=-1.0, arguments={"pattern": "\\d"})
    broken = Recipe(verifiers=(MATH, Verifier(path="tests.rewards.verifiers.raises")))

    async def main():
        async with VerifierPool(2, 20.0) as pool:
            recipes = [good, Recipe(verifiers=(MATH, pattern)), broken]
            return await asyncio.gather(*(judge(pool, recipe, fields) for recipe in recipes))

    shaped, matched, failed = asyncio.run(main())
    assert shaped.reward == pytest.approx((1.0 - 0.2 - 0.5) * 10) and shaped.accuracy == 1.0
    assert matched.reward == 1.0
    assert isinstance(failed, Failure) and failed.kind == "exception" and "cannot judge" in failed.text
