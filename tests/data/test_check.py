import json
from pathlib import Path

import pytest

from areal_jax.data import check


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_the_report_counts_bad_records_duplicates_and_lengths(tmp_path, capsys):
    problem = {"prompt": "1+1?", "answer": "2"}
    path = write(tmp_path / "a.jsonl", problem, problem, {"prompt": "a longer one", "answer": "3"}, '{"prompt"')
    assert check.main([path, "--json", str(tmp_path / "out.json")]) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["records"], report["bad"], report["duplicate_prompts"]) == (3, 1, 1)
    assert report["prompt_lengths"] == {"min": 4, "50%": 4, "90%": 12, "99%": 12, "max": 12}
    assert "a.jsonl:4" in report["bad_places"][0] and "a.jsonl:4" in capsys.readouterr().out


def test_gold_answers_are_given_to_the_verifier(tmp_path, capsys):
    good = [{"prompt": f"{i}?", "answer": a} for i, a in enumerate(["12", "1,200", r"\frac{1}{2}", "-0.5"])]
    assert check.main([write(tmp_path / "a.jsonl", *good), "--verify", "--processes", "1"]) == 0
    assert "gold answers: 4 of 4 accepted" in capsys.readouterr().out


def test_a_verifier_gets_what_it_gets_in_a_run(tmp_path, capsys):
    problem = {"messages": [{"role": "user", "content": "1+1?"}], "answer": "2"}
    path = write(tmp_path / "a.jsonl", problem)
    arguments = [path, "--verify", "--processes", "1", "--verifier", "tests.data.judge:sees_everything"]
    assert check.main(arguments) == 2 and "takes completion_tokens and prompt_tokens: give" in capsys.readouterr().err
    path = write(tmp_path / "b.jsonl", {"prompt": "1+1?", "answer": "2"})
    toy = Path(__file__).parents[2] / "configs" / "toy"
    assert check.main([path, *arguments[1:], "--model", str(toy)]) == 0


def test_a_record_that_cannot_be_judged_by_and_a_refused_gold_answer_are_named_with_their_lines(tmp_path, capsys):
    problems = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "x"}, {"prompt": "c", "answer": "3"}]
    arguments = [write(tmp_path / "a.jsonl", *problems), "--verify", "--processes", "1"]
    assert check.main([*arguments, "--verifier_args", '{"mode": "last_number"}']) == 1
    out = capsys.readouterr().out
    assert "2 of 2 accepted" in out and "a.jsonl:2: verify_math: mode 'last_number' needs a number" in out
    assert check.main([*arguments, "--verifier", "tests.data.judge:shaped"]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 accepted" in out and "a.jsonl:3: accuracy 0" in out


def test_data_that_cannot_be_read_is_one_line(tmp_path, capsys):
    assert check.main([str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("check: the data set")
    with pytest.raises(SystemExit, match="2"):
        check.main([str(tmp_path / "none.jsonl"), "--verifier_args", "{mode: 1}"])
    assert "'{mode: 1}' is no JSON object" in capsys.readouterr().err
