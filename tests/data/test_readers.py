import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from areal_jax.data.arithmetic import terms_of
from areal_jax.data.config import DataConfig
from areal_jax.data.readers import DataError, load_dataset

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return str(path)


def test_gsm8k_answers_are_the_number_after_the_marker(tmp_path):
    source = {"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}
    (record,) = load_dataset(write(tmp_path / "a.jsonl", source))
    assert (record["prompt"], record["answer"]) == ("How many?", "1200")


def test_prompt_answer_records_keep_their_other_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2", "answer": 4, "level": "easy"}, "", {"prompt": "x"})
    data = load_dataset(path)
    assert [dict(r) for r in data] == [{"prompt": "2+2", "answer": "4", "level": "easy"}, {"prompt": "x"}]


def test_math_takes_the_last_box_with_nested_braces(tmp_path):
    source = {"problem": "p", "solution": r"so \boxed{1} and then $\boxed{\frac{1}{\sqrt{2}}}$.", "level": "Level 5"}
    (record,) = load_dataset(write(tmp_path / "a.jsonl", source))
    assert record["answer"] == r"\frac{1}{\sqrt{2}}" and record["level"] == "Level 5"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [(r"\boxed{2} and \boxed{3}", "2, 3"), (r"\boxed{1}, so \boxed{\left\{x\right.}", r"\left\{x\right.")],
)
def test_a_gold_solution_is_read_as_a_models_answer_is(tmp_path, solution, answer):
    (record,) = load_dataset(write(tmp_path / "a.jsonl", {"problem": "p", "solution": solution}))
    assert record["answer"] == answer


def test_json_and_parquet_hold_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    sources = [{"prompt": f"p{i}", "answer": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(sources))
    (tmp_path / "b.json").write_text(json.dumps({"data": sources}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sources), tmp_path / "c.parquet")
    for name in ("a.json", "b.json", "c.parquet"):
        assert list(load_dataset(str(tmp_path / name))) == sources, name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"a.jsonl:2: bad record: not valid JSON"),
        ("[1]", r"a.jsonl:2: bad record: it is a list"),
        ('{"answer": "1"}', r"a.jsonl:2: bad record: it has no 'prompt'"),
        ('{"prompt": ""}', r"a.jsonl:2: bad record: its 'prompt' is not text"),
        ('{"messages": [{"role": "user"}]}', r"a.jsonl:2: bad record: its 'messages'"),
        ('"text"', r"a.jsonl:2: bad record: it is a text"),
        ('{"prompt": "\\ud83d"}', r"a.jsonl:2: bad record: its 'prompt' cannot be sent .*surrogates not allowed"),
        ('{"prompt": "a", "id": 36893488147419103232}', r"a.jsonl:2: bad record: its 'id' cannot be sent .*2\*\*64"),
        ('{"prompt": "a", "x": {"y": [-9223372036854775809]}}', r"a.jsonl:2: bad record: its 'x' cannot be sent"),
        pytest.param('{"prompt": "a", "id": ' + "7" * 5000 + "}", r"a.jsonl:2: bad record: not valid JSON", id="long"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "1"}, line, {"prompt": "q", "answer": "2"})
    with pytest.raises(DataError, match=message):
        load_dataset(path)
    data = load_dataset(path, DataConfig(bad_record="skip"))
    assert len(data) == 2 and len(data.skipped) == 1 and "a.jsonl:2" in data.skipped[0]


def test_missing_empty_and_unknown_data_are_errors(tmp_path):
    for spec, message in [
        (str(tmp_path / "none.jsonl"), "does not exist"),
        (write(tmp_path / "empty.jsonl"), "is empty"),
        (write(tmp_path / "a.txt", {}), "unknown kind"),
        (write(tmp_path / "other.jsonl", {"text": "x"}), "fit no known format"),
        ("", "no data set given"),
        ("arithmetic:counts=3", "'counts=3'"),
        ("arithmetic:min_terms=9", "2 <= min_terms <= max_terms"),
        ("arithmetic:tail=0", "tail, digits must be at least 1"),
        ("arithmetic:held_out=2", "held_out must be 0"),
    ]:
        with pytest.raises(DataError, match=message):
            load_dataset(spec)


def test_a_file_that_cannot_be_read_to_its_end_is_an_error_in_one_line(tmp_path):
    line = json.dumps({"prompt": "p", "answer": "1"}) + "\n"
    packed = gzip.compress(line.encode() * 1000)
    for name, content in (("a.jsonl.gz", line.encode()), ("b.jsonl.gz", packed[:-9]), ("c.json.gz", packed[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}' cannot be read: "):
            load_dataset(str(tmp_path / name))
    damaged = bytearray(packed)
    damaged[12] ^= 255
    (tmp_path / "d.jsonl.gz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"d.jsonl.gz' cannot be read: "):
        load_dataset(str(tmp_path / "d.jsonl.gz"))


def test_a_place_in_a_record_may_be_written_as_a_number(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "0": "7"})
    assert load_dataset(path, DataConfig(fields={"answer": 0}))[0]["answer"] == "7"
    with pytest.raises(DataError, match=r"a.jsonl:1: bad record: it has no '1'"):
        load_dataset(path, DataConfig(fields={"answer": 1}))


def test_arithmetic_is_right_repeatable_and_of_the_lengths_asked():
    data = load_dataset("arithmetic:count=300,seed=3,min_terms=2,max_terms=5")
    again = load_dataset("arithmetic:count=300,seed=3,min_terms=2,max_terms=5")
    other = load_dataset("arithmetic:count=300,seed=4,min_terms=2,max_terms=5")
    assert list(data) == list(again) != list(other)
    assert {record["prompt"].count("+") + 1 for record in data} == {2, 3, 4, 5}
    for record in data:
        terms = [int(t) for t in record["prompt"][:-1].split("+")]
        assert int(record["answer"]) == sum(terms)
        steps, _, final = record["solution"].partition("####")
        assert final == record["answer"]
        for term, step in zip(terms[1:], steps.split(";")):
            left, right = step.split("=")
            assert eval(left) == int(right) and left.endswith(f"+{term}")


def test_a_tail_makes_long_problems_rare():
    lengths = {
        tail: [len(terms_of(record["prompt"])) for record in load_dataset(f"arithmetic:max_terms=16,tail={tail}")]
        for tail in (1, 3)
    }
    least_of_three = sum(n * ((17 - n) ** 3 - (16 - n) ** 3) for n in range(2, 17)) / 15**3
    assert np.mean(lengths[1]) == pytest.approx(9.0, abs=0.2)
    assert np.mean(lengths[3]) == pytest.approx(least_of_three, abs=0.2)
    assert min(lengths[3]) == 2 and max(lengths[3]) >= 15


def test_no_problem_that_is_held_out_is_trained_on():
    def prompts(count, part):
        return {record["prompt"] for record in load_dataset(f"arithmetic:count={count},max_terms=3,held_out={part}")}

    train, held_out = prompts(3000, 0), prompts(300, 1)
    assert len(train) > 600 and len(held_out) > 90 and not train & held_out
    assert prompts(300, -1) & train and prompts(300, -1) & held_out


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared GSM8K files")
def test_the_real_gsm8k_files_are_read_whole():
    for name, count in (("gsm8k_train", 7473), ("gsm8k_test", 1319)):
        data = load_dataset(str(SHARED / f"{name}.jsonl"))
        assert len(data) == count
        assert all(float(record["answer"]) == float(record["answer"]) for record in data)
