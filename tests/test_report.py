"""The page's own parts; that the whole page stands alone is in test_run.py."""

import json

from clm_dist.publish.report import curve, read_rows, samples_by_prompt


def test_rows_survive_a_kill_and_odd_line_ends(tmp_path):
    """A line cut short ends the file; U+2028 inside a sample is no line's end."""
    whole = {"prompt": "a", "text": "one\u2028two\u0085three"}
    lines = json.dumps(whole, ensure_ascii=False) + "\n" + '{"prompt": "b", "te'
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    assert read_rows(tmp_path / "samples.jsonl") == [whole]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_curves_and_samples():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 1, "eval/loss": 3.0}, {"step": 2, "train/loss": 1.0}]
    assert curve(rows, "train/loss") == [(1, 2.0), (2, 1.0)]
    samples = [{"prompt": "a", "text": "1"}, {"prompt": "b", "text": "2"}, {"prompt": "a", "text": "3"}]
    assert [row["text"] for row in samples_by_prompt(samples)["a"]] == ["1", "3"]
