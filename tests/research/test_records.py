"""Fig. 1a and Fig. 9 from what runs have written, worked out by hand."""

import json

import pytest
from records import classification_precision, thresholds_over_time


def write_report(path, **values):
    path.write_text(json.dumps({"images": 3, "protocol": {"split": path.stem.split("-")[1]}} | values))


def test_every_report_of_a_run_is_a_row(tmp_path):
    write_report(tmp_path / "report-val.json", cls_map=80.5)
    write_report(tmp_path / "report-train.json", cls_map=95.0)
    assert classification_precision("guided", tmp_path) == [
        {"run": "guided", "split": "train", "images": 3, "cls_map": 95.0},
        {"run": "guided", "split": "val", "images": 3, "cls_map": 80.5},
    ]
    assert classification_precision("one", tmp_path / "report-val.json") == [
        {"run": "one", "split": "val", "images": 3, "cls_map": 80.5}
    ]


def test_reports_without_precision_and_runs_without_reports_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no report\*.json in .*: score its model with `cosa-hf evaluate"):
        classification_precision("run", tmp_path)
    write_report(tmp_path / "report-val.json")
    with pytest.raises(ValueError, match=r"report-val\.json has no cls_map: score the model again"):
        classification_precision("run", tmp_path)


def test_thresholds_are_the_logs_of_a_run_that_may_have_been_killed(tmp_path):
    log = tmp_path / "log.jsonl"
    entries = [
        {"step": 10, "loss": 1.0},
        {"step": 20, "xi": 0.5, "aux_xi": 0.4, "loss": 1.0},
        {"step": 20, "eval/seg": 1},
    ]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 30, "xi": 0.')
    expected = [{"run": "CoSA", "step": 20, "xi": 0.5, "aux_xi": 0.4}]
    assert thresholds_over_time("CoSA", tmp_path) == thresholds_over_time("CoSA", log) == expected


def test_logs_without_thresholds_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no log.jsonl in .*: MODEL is the directory of a run"):
        thresholds_over_time("run", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl has no xi in any of its 1 entries"):
        thresholds_over_time("run", tmp_path)
