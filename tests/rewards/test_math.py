"""verify_math: what counts as equal, what does not, and that nothing makes it hang."""

import json
import re
import signal
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from areal_jax.rewards import VerifierError, VerifierTimeout, mathematics, verify_math

DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), None)

EQUAL = [
    (r"so \boxed{\frac12}", "1/2"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{0.333333}", "1/3"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{10\text{ miles per hour}}", "10"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{18.0}", "18"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{x=3}", "3"),
    ("3", "x=3"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"),
    (r"\boxed{(1,2]}", "(1,2]"),
    (r"\boxed{3 \le x < 4}", "[3,4)"),
    (r"\boxed{(3,4)}", "(3,4)"),
    (r"so \boxed{1} and \boxed{2}", r"\{1,2\}"),
    (r"\boxed{2}, and therefore \boxed{1}", "1"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{\text{Evelyn}}", "Evelyn"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    ("The answer is 18.", "18"),
    (r"The final answer is $\frac{3}{4}$. I hope it is correct", "0.75"),
    ("3+5=8;8+9=17#### 17", "#### 17"),
    ("no: <think>it is \\boxed{3}</think> It is \\boxed{4}.", r"We get $\boxed{4}$."),
    ("I first thought (B), but it is (C).", "C"),
    (r"\boxed{\text{(C)}}", "(C)"),
]
UNEQUAL = [
    (r"\boxed{-18}", "18"),
    (r"\boxed{18.5}", "18"),
    (r"\boxed{\frac{1}{3}}", "0.33"),
    (r"\boxed{[1,2]}", "(1,2]"),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}"),
    (r"\boxed{x+1}", "x+2"),
    (r"\boxed{}", "3"),
    (r"\boxed{3", "3.5"),
    ("", "3"),
    ("no idea", "3"),
    ("<think>\\boxed{3}</think> 4", "3"),
    ("(B)", "C"),
    (r"\boxed{1000000}", "1000001"),
    (r"\boxed{0.1234567}", "0.1234"),
]
LAST_NUMBER = [
    ("a 10-4=6", 6),
    ("so 10-4", 4),
    ("= -4", -4),
    ("it loses -$4", -4),
    ("$1,234.00", 1234),
    ("18 dollars in 3 days. #### 18\n", 18),
    ("we get 18.", 18),
    ("is **18**", 18),
    (r"\boxed{18}", 18),
    ("12 apples and 3,4", 4),
    ("1,2345", 2345),
    ("(-5)", -5),
    ("x=-7", -7),
    (".5", Fraction(1, 2)),
    ("none", None),
    ("8" * 1000, None),
]
ENDLESS = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{" + "(" * 500 + "1" + ")" * 500 + "}",
    "The answer is 9**9**9**9",
    r"\boxed{\binom{10^9}{500000000}}",
]


@pytest.mark.parametrize(("completion", "answer"), EQUAL)
def test_equal_answers_score_1(completion, answer):
    assert verify_math(completion, answer) == 1.0


@pytest.mark.parametrize(("completion", "answer"), UNEQUAL)
def test_other_answers_score_0(completion, answer):
    assert verify_math(completion, answer) == 0.0


@pytest.mark.parametrize(("text", "number"), LAST_NUMBER)
def test_last_number(text, number):
    assert mathematics.last_number(text) == number
    assert verify_math(text, "2357", mode="last_number") == 0.0
    if number is not None:
        assert verify_math(text, str(number) if number != Fraction(1, 2) else "0.5", mode="last_number") == 1.0


def test_boxed_only_ignores_what_is_not_in_a_box():
    assert verify_math("The answer is 18.", "18", mode="boxed") == 0.0
    assert verify_math(r"The answer is \boxed{18}, or 19.", "18", mode="boxed") == 1.0


def test_the_outer_of_nested_boxes_counts_and_unclosed_ones_do_not():
    assert mathematics.boxed(r"\boxed{a \boxed{b} c} \boxed{d") == r"a \boxed{b} c"
    assert mathematics.boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert mathematics.boxed(r"\boxed{1} or $\fbox{x}$ \boxed{2}") == "2"
    assert mathematics.boxed(r"\boxed{1}, \boxed{1} and $\boxed{2}$") == "1, 2"


def test_extraction_is_linear_in_hostile_text():
    for text in (r"\boxed{" * 100_000, "}" * 700_000, "1," * 350_000, r"\boxed{1} and " * 50_000, "-" * 700_000):
        assert verify_math(text, "7", mode="boxed") == 0.0
        assert verify_math(text, "7", mode="last_number") == 0.0


@pytest.mark.parametrize("completion", ENDLESS, ids=range(len(ENDLESS)))
def test_a_comparison_that_never_ends_is_interrupted_and_named(completion):
    with pytest.raises(VerifierTimeout, match="killed"):
        verify_math(completion, "7", timeout=0.2)
    assert verify_math(completion, "7", timeout=0.2, on_timeout="zero") == 0.0
    assert verify_math(r"\boxed{\frac12}", "0.5") == 1.0  # the helper was replaced


def test_it_works_in_threads_and_leaves_the_callers_signals_alone():
    before, results = signal.getsignal(signal.SIGALRM), []

    def judge():
        results.append(verify_math(r"\boxed{\frac{1}{4}}", "0.25"))
        try:
            verify_math(r"\boxed{9^{9^{9^9}}}", "7", timeout=0.5)
        except VerifierTimeout as error:
            results.append(str(error))

    threads = [threading.Thread(target=judge) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(1.0) == 3 and len(results) == 6
    assert signal.getsignal(signal.SIGALRM) is before


def test_inside_a_worker_python_code_is_interrupted_by_the_alarm(monkeypatch):
    monkeypatch.setenv("AREAL_JAX_VERIFIER_WORKER", "1")
    with pytest.raises(VerifierTimeout, match=r"more than 0\.3 s"):
        verify_math(r"\boxed{" + "(" * 500 + "1" + ")" * 500 + "}", "7", timeout=0.3)


def test_bad_gold_answers_and_settings_are_errors_not_scores():
    with pytest.raises(VerifierError, match="gold answer must be text"):
        verify_math(r"\boxed{\frac12}", "")
    with pytest.raises(VerifierError, match="gold answer cannot be read"):
        verify_math(r"\boxed{\frac12}", "$$")
    with pytest.raises(VerifierError, match="needs a number"):
        verify_math("3", "x+1", mode="last_number")
    with pytest.raises(VerifierError, match="auto, last_number, boxed"):
        verify_math("3", "3", mode="first")


def gsm8k() -> list[tuple[str, str]]:
    if DATA is None:
        pytest.skip("no shared/data beside the repository")
    files = [DATA / "gsm8k_train.jsonl", DATA / "gsm8k_test.jsonl"]
    solutions = [json.loads(line)["answer"] for file in files for line in file.read_text().splitlines()]
    return [(solution, solution.rpartition("####")[2].strip()) for solution in solutions]


def perturbed(gold: str) -> set[str]:
    """Wrong answers near `gold`: neighbours, sign, factors of ten, a half more, two digits swapped, one digit lost."""
    value = int(gold.replace(",", ""))
    digits = str(abs(value))
    wrong = {value + 1, value - 1, -value, value * 10, value + 100, value * 2}
    wrong |= {int(digits[::-1]), int(digits[1:] or 0), int(digits[:-1] or 0)}
    return {str(number) for number in wrong - {value}} | {f"{value}.5", f"{value}/7" if value else "1/7"}


def check_gsm8k(pairs: list[tuple[str, str]]) -> None:
    for solution, gold in pairs:
        for mode in mathematics.MODES:
            assert verify_math(solution + f"\nThe answer is \\boxed{{{gold}}}.", solution, mode=mode) == 1.0, gold
        assert verify_math(solution, gold) == verify_math(solution, gold, mode="last_number") == 1.0, solution
        steps = re.sub(r"####.*", "", solution, flags=re.DOTALL)
        for wrong in perturbed(gold):
            assert verify_math(f"{steps}#### {wrong}", solution) == 0.0, (gold, wrong)
            assert verify_math(f"{steps}\\boxed{{{wrong}}}", solution, mode="boxed") == 0.0, (gold, wrong)
            if "/" not in wrong:
                assert verify_math(f"{steps}#### {wrong}", solution, mode="last_number") == 0.0, (gold, wrong)


def test_a_sample_of_gsm8k_accepts_the_gold_answers_and_no_perturbed_one():
    check_gsm8k(gsm8k()[::200])


@pytest.mark.slow
def test_all_of_gsm8k_accepts_the_gold_answers_and_no_perturbed_one():
    pairs = gsm8k()
    assert len(pairs) == 8792
    check_gsm8k(pairs)


@pytest.mark.parametrize("answer", [None, True, False, {"value": 6}, ["5"], "", " ", "####", float("nan")], ids=repr)
@pytest.mark.parametrize("completion", ["", "#### None", "####5", r"\boxed{True}", r"\boxed{6}"])
@pytest.mark.parametrize("mode", mathematics.MODES)
def test_a_gold_answer_that_cannot_be_one_is_an_error_and_never_a_score(completion, answer, mode):
    with pytest.raises(VerifierError, match="the gold answer must be text or a finite number"):
        verify_math(completion, answer, mode=mode)


@pytest.mark.parametrize("answer", [6, 6.0, "6", Fraction(6), "so 2+4=6 #### 6"], ids=repr)
def test_numbers_and_texts_are_gold_answers(answer):
    assert verify_math("#### 6", answer) == 1.0 and verify_math("#### 7", answer) == 0.0
