"""Folders as on the Hugging Face hub, compressed files, and data sets whose fields have other names."""

import gzip
import json

import pytest

from areal_jax.data import check
from areal_jax.data.config import DataConfig
from areal_jax.data.readers import DataError, load_dataset


def lines(count, start=0):
    return "".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) + "\n" for i in range(start, start + count))


def parquet(path, count, start=0):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": f"p{i}", "answer": str(i)} for i in range(start, start + count)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.fixture
def hub(tmp_path):
    """A repository of the hub, downloaded: two shards for training, one for tests."""
    folder = tmp_path / "gsm"
    parquet(folder / "data" / "train-00000-of-00002.parquet", 3)
    parquet(folder / "data" / "train-00001-of-00002.parquet", 2, 3)
    parquet(folder / "data" / "test-00000-of-00001.parquet", 4, 100)
    (folder / "README.md").write_text("a card\n")
    (folder / "dataset_infos.json").write_text("{}")
    return str(folder)


def test_one_split_of_a_folder_is_read_in_order(hub):
    assert [r["answer"] for r in load_dataset(f"{hub}:train")] == ["0", "1", "2", "3", "4"]
    assert [r["answer"] for r in load_dataset(f"{hub}:test")] == ["100", "101", "102", "103"]


def test_training_and_test_problems_are_never_mixed_silently(hub):
    with pytest.raises(DataError, match=r"several splits \(test, train\): name one, as in '.*gsm:train'"):
        load_dataset(hub)
    with pytest.raises(DataError, match=r"no split 'validation'; it has test, train"):
        load_dataset(f"{hub}:val")


def test_configurations_of_one_data_set_are_never_joined_silently(tmp_path):
    for name, start in (("main", 0), ("socratic", 10)):
        parquet(tmp_path / name / "train-00000-of-00001.parquet", 2, start)
    with pytest.raises(DataError, match=r"configurations \(main, socratic\): name one, as in .*socratic:train"):
        load_dataset(f"{tmp_path}:train")
    assert [r["answer"] for r in load_dataset(f"{tmp_path}/main:train")] == ["0", "1"]


@pytest.mark.parametrize(
    ("names", "split", "answers"),
    [
        (["train/algebra/1.json", "test/algebra/1.json"], "train", ["0"]),
        (["a.jsonl", "b.jsonl"], "", ["0", "1"]),
        (["test.jsonl", "test2.jsonl"], "", ["0", "1"]),
        (["x_dev.jsonl", "x_train.jsonl"], "validation", ["0"]),
        (["contest.jsonl", "latest.jsonl"], "train", ["0", "1"]),  # "test" inside a word is none
    ],
)
def test_what_split_a_file_belongs_to(tmp_path, names, split, answers):
    for i, name in enumerate(names):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(lines(1, i))
    spec = f"{tmp_path}/d:{split}" if split else f"{tmp_path}/d"
    assert [r["answer"] for r in load_dataset(spec)] == answers


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(3).encode()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([{"prompt": "p", "answer": 7}]).encode()))
    assert len(load_dataset(str(tmp_path / "a.jsonl.gz"))) == 3
    assert load_dataset(str(tmp_path / "b.json.gz"))[0]["answer"] == "7"


def test_fields_of_other_names_are_settings(tmp_path):
    """The shape of many data sets for reinforcement learning: chat turns, and the answer deep inside."""
    turns = [{"role": "user", "content": "6*7?"}]
    record = {"prompt": turns, "reward_model": {"ground_truth": "42", "style": "rule"}, "options": ["1", "42"]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (found,) = load_dataset(str(path), DataConfig(fields={"answer": "reward_model.ground_truth", "other": "options.0"}))
    assert found["messages"] == turns and found["answer"] == "42" and found["other"] == "1" and "prompt" not in found
    with pytest.raises(DataError, match=r"a\.jsonl:1: bad record: it has no 'reward_model\.truth'"):
        load_dataset(str(path), DataConfig(fields={"answer": "reward_model.truth"}))


def test_the_check_takes_splits_and_fields(tmp_path, hub, capsys):
    assert check.main([f"{hub}:test", "--verify", "--processes", "1"]) == 0
    assert "4 records, 0 bad" in capsys.readouterr().out
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"Problem": "1+1?", "Answer": 2}) + "\n")
    assert check.main([str(path)]) == 2
    assert check.main([str(path), "--fields", '{"prompt": "Problem", "answer": "Answer"}', "--verify"]) == 0
    assert "1 of 1 accepted" in capsys.readouterr().out


def test_the_name_of_a_data_set_on_the_hub_says_how_to_get_it():
    with pytest.raises(DataError, match="hf download --repo-type dataset openai/gsm8k --local-dir"):
        load_dataset("openai/gsm8k")
