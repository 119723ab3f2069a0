"""verify_code: programs are found, run and judged in all three forms of tests."""

import asyncio
import json
import os
import signal
import tempfile
import types
from pathlib import Path

import psutil
import pytest

from areal_jax.rewards import VerifierError, VerifierPool, VerifierTimeout, code, exchange, sandbox, verify_code
from areal_jax.rewards.code import extract_program, grade_code
from areal_jax.rewards.code_tests import Calls, read_tests, same_output, same_value
from tools.mutants import mutants, plainly

DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), None)
ISOLATION = next((kind for kind in ("landlock", "bwrap") if not sandbox.works(kind)), None)
pytestmark = pytest.mark.skipif(ISOLATION is None, reason="no sandbox here")
OPTIONS = {"isolation": ISOLATION or "auto", "cpu_seconds": 2, "wall_seconds": 10.0}

ADD = "def add(a, b):\n    return a + b\n"
SUM_SCRIPT = "n = int(input())\nprint(sum(int(x) for x in input().split()))"
SUM_TESTS = {"inputs": ["3\n1 2 3\n", "1\n5\n"], "outputs": ["6\n", "5"]}


def grade(completion, tests, **options):
    return grade_code(completion, tests, **(OPTIONS | options))


# --- The forms of tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tests",
    [
        ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"],
        {"test_list": ["assert add(1, 2) == 3"], "test_setup_code": "import math", "test_imports": ["import re"]},
        "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n\n"
        "def test_big():\n    assert add(2**80, 1) == 2**80 + 1\n",
        {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [[1, 2]]]},
        json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]),
        [{"type": "function_call", "fn_name": "add", "input": [1.5, 2], "output": 3.5}],
    ],
    ids=["mbpp", "mbpp_record", "pytest", "taco_calls", "livecodebench_calls", "calls"],
)
def test_functions(tests):
    assert grade(f"Here it is:\n```python\n{ADD}```\n", tests)["reward"] == 1.0
    wrong = grade(ADD.replace("a + b", "a + b if a not in (1, 1.5) else 7"), tests, reward="fraction")
    assert wrong["accuracy"] == 0.0 and wrong["passed"] < wrong["tests"] and wrong["reason"].startswith("wrong_answer")


@pytest.mark.parametrize(
    "tests",
    [
        SUM_TESTS,
        json.dumps(SUM_TESTS),
        [{"input": a, "output": b, "testtype": "stdin"} for a, b in zip(*SUM_TESTS.values())],
        {"inputs": [["3", "1 2 3"]], "outputs": [["6"]]},
    ],
    ids=["taco", "taco_json", "livecodebench", "lines"],
)
def test_scripts(tests):
    assert grade(f"```python\n{SUM_SCRIPT}\n```", tests)["reward"] == 1.0
    assert grade(f"```python\n{SUM_SCRIPT}\nprint()\nprint(1)\n```", tests)["reason"] == "wrong_answer"
    assert grade(f"```python\n{SUM_SCRIPT}\n1 / 0\n```", tests)["reason"].startswith("exception: ZeroDivisionError")


def test_methods_of_a_solution_class():
    program = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    assert grade(program, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})["reward"] == 1.0
    assert grade(program, ["assert Solution().add(1, 2) == 3"])["reward"] == 1.0


def test_objects_and_exceptions_of_the_program_cross_to_the_assertions():
    program = """
        class Pair:
            def __init__(self, a, b): self.a, self.b = a, b
            def total(self): return self.a + self.b
        def largest(pairs): return max(pairs, key=Pair.total)
        def refuse(x): raise ValueError(f"not {x}")
        def count(n): yield from range(n)
        LIMIT = {"n": (1, 2.5, None, {3}, b"x", 1j)}
    """
    tests = [
        "p = Pair(1, 2)\nassert p.total() == 3 and p.a == 1",
        "assert largest([Pair(1, 2), Pair(3, 4)]).total() == 7",
        "try:\n    refuse(3)\nexcept ValueError as e:\n    assert str(e) == 'not 3'\nelse:\n    assert False",
        "assert list(count(3)) == [0, 1, 2]",
        "assert LIMIT == {'n': (1, 2.5, None, {3}, b'x', 1j)}",
        "p = Pair([1], [2])\nassert p == p and p != Pair([1], [2])",
    ]
    graded = grade("```\n" + program.replace("\n        ", "\n") + "\n```", tests)
    assert graded["reward"] == 1.0, graded


def test_changes_in_place_are_seen_only_on_request():
    program, tests = "def drop(x):\n    x.pop()", ["x = [1, 2]\ndrop(x)\nassert x == [1]"]
    assert grade(program, tests)["reward"] == 0.0
    assert grade(program, tests, in_place=True)["reward"] == 1.0
    thief, weak = "def f(x):\n    x.clear()\n    return []", ["x = [2, 1]\nassert f(x) == sorted(x)"]
    assert grade(thief, weak)["reward"] == 0.0


def test_helpers_of_the_prompt_are_the_tests_own():
    starter = 'def square(x):\n    return x * x\n\ndef root(x):\n    """The square root of x."""\n'
    tests = "def check(candidate):\n    assert square(candidate(9)) == 9\n"
    options = {"entry_point": "root", "starter": starter}
    assert grade("    return 3\n", tests, **options)["reward"] == 1.0
    cheat = "```python\ndef square(x):\n    return 9\ndef root(x):\n    return 0\n```"
    assert grade(cheat, tests, **options)["reward"] == 0.0


def test_the_reward_may_be_the_fraction_of_tests():
    tests = ["assert add(1, 2) == 3", "assert add(0, 2) == 3", "assert add(2, 2) == 4", "assert add(1, 1) == 3"]
    graded = grade(ADD, tests, reward="fraction")
    assert graded["reward"] == 0.5 and graded["accuracy"] == 0.0 and graded["tests"] == 4
    assert grade(ADD, tests)["reward"] == 0.0
    half = {"inputs": ["1\n1", "1\n2"], "outputs": ["1", "3"]}
    assert grade(SUM_SCRIPT, half, reward="fraction")["reward"] == 0.5


def test_a_program_that_runs_for_ever_on_every_test_is_wrong_and_no_failure_of_the_verifier():
    many = {"inputs": ["1"] * 9, "outputs": ["1"] * 9}
    options = {"reward": "fraction", "cpu_seconds": 1, "total_seconds": 1.5}
    graded = grade("while True: pass", many, **options)
    assert graded["reward"] == 0.0 and graded["tests"] == 9 and graded["reason"] in ("cpu_limit", "timeout")


@pytest.fixture
def timed(monkeypatch):
    """Programs that are a list of seconds, one for each test, against a clock of their own; no sandbox is needed."""
    clock, walls = [0.0], []
    monkeypatch.setattr(code, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def run_script(program, stdin, *, limits, isolation):
        seconds, walls[:] = json.loads(program)[len(walls)], [*walls, limits.wall_seconds]
        clock[0] += min(seconds, limits.cpu_seconds, limits.wall_seconds)
        if seconds < min(limits.cpu_seconds, limits.wall_seconds):
            return sandbox.RunResult("", "1", "", seconds)
        reason = "cpu_limit" if limits.cpu_seconds < limits.wall_seconds else "timeout"
        return sandbox.RunResult(reason, "", "", seconds)

    monkeypatch.setattr(sandbox, "run_script", run_script)
    many = {"inputs": ["1"] * 9, "outputs": ["1"] * 9}

    def run(seconds, **options):
        return grade_code(json.dumps(seconds), many, isolation="landlock", reward="fraction", time_limit=15, **options)

    return run, clock, walls


def test_no_test_of_a_script_goes_on_beyond_the_time_for_all_of_them(timed):
    run, clock, walls = timed
    graded = run([99] * 9)
    assert graded["reward"] == 0.0 and graded["tests"] == 9 and graded["reason"] == "cpu_limit"
    assert clock[0] == 12.0 and walls == [12.0, 7.0, 2.0]


def test_one_test_that_takes_most_of_the_time_for_all_is_the_programs_doing_and_many_slow_ones_are_not(timed):
    run, _, walls = timed
    graded = run([1, 99], cpu_seconds=60)
    assert graded["passed"] == 1 and graded["reason"] == "timeout" and walls == [12.0, 11.0]
    walls.clear()
    with pytest.raises(VerifierTimeout, match=r"together took more.*; 4 of 9 passed"):
        run([2.5] * 9)


def test_numpy_is_there_and_its_results_are_plain():
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef total(x): return np.sum(np.array(x))\ndef twice(x): return np.array(x) * 2"
    assert grade(program, ["assert total([1, 2]) == 3", "assert twice([1, 2]) == [2, 4]"])["reward"] == 1.0


# --- What is no program, and what are no tests ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("I do not know.", "no_program"),
        ("```python\ndef add(a, b:\n```", "SyntaxError"),
        ("```python\nx = 1\n```", "NameError"),
        ("```cpp\nint main() {}\n```", "no_program"),
    ],
)
def test_what_is_no_program_scores_0_by_name(completion, reason):
    graded = grade(completion, ["assert add(1, 2) == 3"])
    assert graded["reward"] == 0.0 and reason in graded["reason"]


@pytest.mark.parametrize(
    ("tests", "text"),
    [
        ([], "expected source"),
        ("", "there are none"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ({"question": "?"}, "found \\['question'\\]"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "need a function"),
        (["assert add(1, 2) = 3"], "do not compile"),
        (["import no_such_module\nassert add(1, 2) == 3"], "no_such_module"),
        (["assert add(lambda: 1, 2) == 3"], "cannot be sent"),
    ],
)
def test_broken_tests_are_errors_not_scores(tests, text):
    with pytest.raises(VerifierError, match=text):
        grade(ADD, tests)


def test_a_program_that_was_confined_counts_so_though_its_word_was_not_read_in_time(monkeypatch):
    """The watch ends with the tests; on a busy machine the other child's pipe may not have been looked at by then."""
    watch, handle, unread = sandbox._watch, sandbox.Child.handle, []
    monkeypatch.setattr(sandbox, "_watch", lambda children, until: unread.append(children[0]) or watch(children, until))

    def late(child, fd):
        return True if child in unread and child.reading.get(fd) == "ready" else handle(child, fd)

    monkeypatch.setattr(sandbox.Child, "handle", late)
    assert grade(ADD, ["assert add(1, 2) == 3"])["reward"] == 1.0


def test_a_program_that_cannot_be_ended_is_named_and_not_waited_for(monkeypatch):
    """One that the kernel holds at a disk, say; played by a SIGKILL that does nothing."""
    started, kill = [], os.killpg
    monkeypatch.setattr("areal_jax.rewards.process.REAP_SECONDS", 0.1)
    monkeypatch.setattr(os, "killpg", lambda group, number: started.append(group))
    with pytest.raises(VerifierError, match=r"sandboxed program \(process \d+\) has not ended 0.1 s after SIGKILL"):
        sandbox.run_script("import time\ntime.sleep(999)", limits=sandbox.Limits(wall_seconds=1.0))
    program = psutil.Process(started[-1])
    kill(program.pid, signal.SIGKILL)
    program.wait(10)


def test_where_there_is_no_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox, "works", lambda isolation: "forbidden here")
    with pytest.raises(VerifierError, match="install bubblewrap"):
        verify_code(ADD, ["assert add(1, 2) == 3"])


def test_programs_under_test_die_with_the_worker_that_runs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fields = {"completion": "import time\ntime.sleep(999)", "tests": SUM_TESTS, **OPTIONS, "wall_seconds": 600.0}

    async def main():
        others = set(psutil.Process().children(recursive=True))  # of tests before this one
        pool = VerifierPool(1, 900.0)
        await pool.start()
        call = asyncio.create_task(pool.submit("areal_jax.rewards.grade_code", fields))
        while len(running := set(psutil.Process().children(recursive=True)) - others) < 2:
            await asyncio.sleep(0.01)
        await pool.close()
        return await call, psutil.wait_procs(list(running), 10)[1]

    outcome, alive = asyncio.run(main())
    assert outcome.kind == "crash" and not alive and not os.listdir(tmp_path)


# --- Extraction and comparison -------------------------------------------------------------------------------------


def test_extraction():
    assert extract_program("```python\na = 1\n```\ntext\n```py\nb = 2\n```") == "b = 2\n"
    assert extract_program("```bash\nls\n```\n```\nc = 3\n```") == "c = 3\n"
    assert extract_program("```python\na = 1\n```\nIt prints\n```\n1\n```") == "a = 1\n"
    assert extract_program("<think>\n```python\na = 1\n```\n</think>\n```python\nb = 2") == "b = 2"
    assert extract_program("x = 1\nprint(x)") == "x = 1\nprint(x)"
    assert extract_program("- Here:\n  ```python\n  a = 1\n  ```\n") == "a = 1\n"
    starter = 'import math\ndef half(x):\n    """Half."""\n'
    assert extract_program("    return x / 2\n", starter) == starter + "    return x / 2\n"
    assert extract_program("```python\ndef half(x):\n    return x / 2\n```", starter).count("def half") == 2
    assert extract_program("```python\n    return x / 2\n```", starter) == starter + "    return x / 2\n"


def test_outputs_are_compared_as_judges_do():
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert same_output("0.3333333333", "0.33333333")
    assert not same_output("1\n2", "1 2")
    assert not same_output("10000000", "10000001")
    assert not same_output("nan", "1.0") and not same_output("", "1")


def test_values_are_compared_as_json():
    assert same_value((1, [2.0000000001]), [1, [2]])
    assert same_value({1: "a"}, {"1": "a"})
    assert not same_value(True, 1) and not same_value(1, True) and not same_value("1", 1)
    assert not same_value([1], [1, 2]) and not same_value({"a": 1}, {"a": 1, "b": 2})
    assert isinstance(read_tests({"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}), Calls)


def test_what_a_program_returns_is_compared_as_json_and_only_texts_of_it_are_hashed():
    def sent(value):
        return exchange.decode_json(exchange.encode(value, lambda value: ["o", 0, type(value).__name__]))

    keys = {"a": 1, 2: (3, 1 << 60), 4.5: None, None: {True: "x"}, 1 << 60: 5}
    found = {"a": 1, "2": [3, 1 << 60], "4.5": None, "None": {"True": "x"}, str(1 << 60): 5}
    assert sent(keys) == found and same_value(sent(keys), found)
    for foreign in ({1, 2}, frozenset(), {(1, 2): 3}, object(), b"x", 1j):
        assert not any(same_value(sent([foreign]), [value]) for value in ([1, 2], [], {}, {"(1, 2)": 3}, None, "x"))
    for broken in ([], ["l"], ["l", 1], ["i", "?"], ["d", [1]], {"l": 1}, ["d", [[["i", "f" * 5000], 1]]]):
        with pytest.raises(exchange.PeerGone):
            exchange.decode_json(broken)


def test_a_frame_that_takes_more_memory_than_there_is_is_the_programs_failure(monkeypatch):
    def loads(data):
        raise MemoryError

    monkeypatch.setattr(exchange, "json", types.SimpleNamespace(loads=loads))
    with pytest.raises(exchange.PeerGone):
        list(exchange.split_frames(b"\2\0\0\0[]"))


# --- HumanEval -----------------------------------------------------------------------------------------------------


def check_human_eval(step: int, isolation: str) -> int:
    if DATA is None:
        pytest.skip("no shared/data beside the repository")
    records = [json.loads(line) for line in (DATA / "human_eval.jsonl").read_text().splitlines()][::step]
    for record in records:
        for completion in (
            record["canonical_solution"],
            f"```python\n{record['prompt']}{record['canonical_solution']}\n```",
        ):
            graded = grade(
                completion,
                record["test"],
                entry_point=record["entry_point"],
                starter=record["prompt"],
                isolation=isolation,
            )
            assert graded["reward"] == 1.0, (record["task_id"], graded)
    pairs = [(record, program) for record in records for program in mutants(record).values()]
    wrong = 0
    for (record, program), passes in zip(pairs, plainly(pairs), strict=True):
        graded = grade(program, record["test"], entry_point=record["entry_point"], isolation=isolation)
        assert graded["reward"] == passes, (record["task_id"], graded, program)
        wrong += not passes
    assert wrong > len(pairs) // 2
    return len(records)


def test_what_a_trusted_program_writes_is_not_taken_for_a_verdict():
    record = {"test": "def check(candidate):\n    assert candidate() == 1", "entry_point": "one"}
    loud = "import sys\nprint(1, file=sys.stderr)\nx = 1 is 1\ndef one():\n    print(0)\n    return {}"
    assert plainly([(record, loud.format(n)) for n in (1, 2, 1)]) == [True, False, True]


def test_a_sample_of_human_eval():
    check_human_eval(25, OPTIONS["isolation"])


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["bwrap", "landlock"])
def test_all_of_human_eval_passes_and_every_mutant_is_judged_as_by_plain_execution(isolation):
    if sandbox.works(isolation):
        pytest.skip(sandbox.works(isolation))
    assert check_human_eval(1, isolation) == 164
