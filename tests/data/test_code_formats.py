"""Records as their publishers write them, read to what the code verifier understands, and judged by it."""

import base64
import json
import struct
import zlib
from pathlib import Path

import pytest

from areal_jax.data import code_formats
from areal_jax.data.formats import BadRecord, detect, formats
from areal_jax.data.readers import load_dataset
from areal_jax.rewards import verify_code
from areal_jax.rewards.code_tests import Assertions, Calls, InputOutput, read_tests

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
CASES = json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}])
CALLS = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
SOURCES = {
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n",
                  "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add"},
    "mbpp": {"task_id": 2, "text": "Add two numbers.", "code": "def add(a, b): return a + b",
             "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""},
    "taco": {"question": "Add.", "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]}),
             "starter_code": "", "difficulty": "EASY"},
    "deepcoder": {"problem": "Add.", "tests": json.dumps([{"input": "1 2", "output": "3", "type": "stdin_stdout"}])},
    "livecodebench": {"question_content": "Add.", "public_test_cases": CASES, "private_test_cases": CASES,
                      "starter_code": "", "metadata": "{}", "question_id": "a"},
}  # fmt: skip
KINDS = dict.fromkeys(SOURCES, InputOutput) | {"humaneval": Assertions, "mbpp": Assertions}
PROGRAMS = {"humaneval": "    return a + b\n", "mbpp": "def add(a, b): return a + b\n"}


@pytest.mark.parametrize("name", SOURCES)
def test_each_format_is_recognised_and_its_right_program_passes(name):
    assert detect(SOURCES[name]) == name
    record = formats()[name](SOURCES[name])
    assert isinstance(read_tests(record["tests"], record.get("entry_point")), KINDS[name])
    program = PROGRAMS.get(name, "print(sum(map(int, input().split())))\n")
    options = {"tests": record["tests"], "entry_point": record.get("entry_point"), "starter": record.get("starter", "")}
    assert verify_code(f"```python\n{program}```", **options) == 1.0
    assert verify_code(f"```python\n{program.replace('+', '-').replace('sum', 'max')}```", **options) == 0.0
    assert "```python" in record["prompt"]


def serialised(text):
    """One text as Python's serialisation writes it: protocols 2 and 4, the latter with all three widths of length."""
    data = text.encode()
    bodies = [b"X" + struct.pack("<I", len(data)) + data, b"\x8d" + struct.pack("<Q", len(data)) + data]
    if len(data) < 256:
        bodies.append(b"\x8c" + bytes([len(data)]) + data)
    yield b"\x80\x02" + bodies[0] + b"q\x00."
    for body in bodies:
        yield b"\x80\x04\x95" + struct.pack("<Q", len(body) + 2) + body + b"\x94."


def test_livecodebench_hidden_tests_are_read_without_running_anything():
    samples = list(serialised(json.dumps(CALLS)))
    assert len(samples) == 4
    for sample in samples:
        hidden = base64.b64encode(zlib.compress(sample)).decode()
        source = SOURCES["livecodebench"] | {
            "public_test_cases": json.dumps(CALLS), "private_test_cases": hidden, "metadata": '{"func_name": "add"}',
            "starter_code": "def add(xs, y):\n",
        }  # fmt: skip
        record = formats()["livecodebench"](source)
        assert record["tests"] == CALLS * 2 and record["entry_point"] == "add"
        assert isinstance(read_tests(record["tests"], "add"), Calls)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]\x94\x8c\x01x\x94a.",  # a list with one text
        b"\x80\x02cbuiltins\nprint\nq\x00.",  # a function
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00trueq\x00\x85R.",  # a call
        b"\x80\x02K\x03.",  # a number
        b"\x80\x04\x8c\x02[]\x94.more",  # a text, and then more
        b"\x80\x04\x8c\xff[]",  # cut off
        b"",
    ],
)
def test_anything_but_one_text_is_refused(data):
    hidden = base64.b64encode(zlib.compress(data)).decode()
    with pytest.raises(BadRecord, match="cannot be read"):
        formats()["livecodebench"](SOURCES["livecodebench"] | {"private_test_cases": hidden})


def test_deepcoder_calls_and_long_texts():
    calls = json.dumps({"inputs": [[[1, 2], 3]], "outputs": [6], "fn_name": "add"})
    record = code_formats.deepcoder({"problem": "Add.", "tests": calls, "starter_code": "def add(xs, y):"})
    assert isinstance(read_tests(record["tests"]), Calls) and "standard input" not in record["prompt"]
    long = json.dumps([{"input": "x" * 70_000, "output": "y"}])
    assert [code_formats._serialised_text(data) for data in serialised(long)] == [long] * 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("humaneval", {"test": ""}, "its 'test' is not text"),
        ("mbpp", {"test_list": []}, "its 'test_list'"),
        ("taco", {"input_output": "{"}, "its 'input_output' is not valid JSON"),
        ("taco", {"input_output": "{}"}, "holds no tests"),
        ("deepcoder", {"tests": "[]"}, "its 'tests' are empty"),
        ("livecodebench", {"private_test_cases": "%%"}, "'private_test_cases' cannot be read"),
    ],
)
def test_what_is_missing_is_named(name, change, message):
    with pytest.raises(BadRecord, match=message):
        formats()[name](SOURCES[name] | change)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared HumanEval file")
def test_the_real_humaneval_file_is_read_whole():
    data = load_dataset(str(SHARED / "human_eval.jsonl"))
    assert len(data) == 164 and all(record["starter"] in record["prompt"] for record in data)
