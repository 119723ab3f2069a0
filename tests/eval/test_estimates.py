"""The estimators against enumeration, published numbers and simulation."""

import itertools
import math

import numpy as np
import pytest

from areal_jax.eval.estimates import mean_over_problems, pass_at_k, summarize, wilson


@pytest.mark.parametrize("n, correct, k", [(n, c, k) for n in (1, 4, 6) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(n, correct, k):
    answers = [True] * correct + [False] * (n - correct)
    choices = list(itertools.combinations(answers, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_with_numbers_whose_binomials_do_not_fit_a_float():
    exact = 1 - math.comb(3000 - 3, 1000) / math.comb(3000, 1000)
    assert pass_at_k(3000, 3, 1000) == pytest.approx(exact, abs=1e-12)
    assert pass_at_k(64, 0, 8) == 0.0 and pass_at_k(64, 57, 8) == 1.0


@pytest.mark.parametrize("n, correct, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_counts_are_refused(n, correct, k):
    with pytest.raises(ValueError, match="pass_at_k needs"):
        pass_at_k(n, correct, k)


def test_wilson_interval_by_its_defining_equation():
    for successes, n in ((0, 20), (3, 20), (20, 20), (700, 1319)):
        low, high = wilson(successes, n)
        share = successes / n
        assert 0 <= low <= share <= high <= 1 and low < high
        for end in {low, high} - {0.0, 1.0}:  # |share - p| = z sqrt(p (1 - p) / n) there
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)


def test_one_answer_per_problem_gets_wilsons_interval_and_several_a_bootstrap():
    once = summarize([[1.0], [0.0], [1.0], [1.0]], ks=[1])
    assert {e.method for e in once.values()} == {"wilson"}
    assert once["pass@1"] == once["avg@1"] and once["pass@1"].value == 0.75
    assert (once["pass@1"].low, once["pass@1"].high) == wilson(3, 4)

    several = summarize([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], ks=[1, 2, 3])
    assert list(several) == ["avg@2", "pass@1", "pass@2"]  # there are no three answers
    assert several["avg@2"].value == several["pass@1"].value == pytest.approx(0.5)
    assert several["pass@2"].value == pytest.approx(2 / 3)
    assert {e.method for e in several.values()} == {"bootstrap over problems"}


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_no_interval_is_empty_where_every_answer_was_judged_alike(right):
    found = summarize([[right] * 4] * 8, ks=[4])
    for estimate in found.values():
        assert (estimate.low, estimate.high) == wilson(int(8 * right), 8) and estimate.high - estimate.low > 0.2


def test_a_fraction_of_tests_counts_in_the_average_and_is_not_a_pass():
    found = summarize([[0.5, 0.5], [1.0, 0.0]], ks=[1])
    assert found["avg@2"].value == pytest.approx(0.5) and found["pass@1"].value == pytest.approx(0.25)


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(5), 0
    for i in range(200):  # 40 problems of very different difficulty, 4 answers each; the mean difficulty is 1/2
        difficulty = random.beta(0.5, 0.5, 40)
        estimate = mean_over_problems(random.binomial(4, difficulty) / 4, seed=i)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99
    assert mean_over_problems([0.0, 1.0, 0.5], seed=3) == mean_over_problems([0.0, 1.0, 0.5], seed=3)
