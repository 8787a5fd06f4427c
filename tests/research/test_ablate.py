"""research/ablate.py as a user runs it, on drawn shapes with a tiny network."""

import csv
import json
import re
import shlex

import ablate
import pytest

TINY = shlex.split(
    "--recipe shapes-tiny --train_split test --backbone test_vit --aux_layer -2 --decoder_channels 16 "
    "--decoder_dilation 1 --crop_size 64 --input_size 64 --batch_size 2 --num_workers 0 --max_steps 4 "
    "--warmup_steps 2 --lr_warmup_steps 1 --ema_momentum 0.2 --tracker none --log_every 1 --scales 1 --no_flip"
)


@pytest.mark.slow
def test_a_table_is_run_once_and_its_markdown_is_what_was_measured(tmp_path, capsys):
    """One row and one seed, in real processes; of many, test_ablation_run.py is."""
    table = [*("--table", "4b"), *TINY, *("--rows", "without CSC"), *("--output_dir", str(tmp_path))]
    ablate.main(table)
    printed = capsys.readouterr().out
    assert "without CSC: separation_weight 0.1 -> 0.0" in printed
    assert printed.count(": training, ") == 1

    values = {line["metric"]: float(line["value"]) for line in csv.DictReader((tmp_path / "4b-val.csv").open())}
    markdown = (tmp_path / "4b-val.md").read_text()
    header, _, (_, _, count, *cells, _) = (
        line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("|")
    )
    assert count == "1"
    assert dict(zip(header[3:-1], cells, strict=True)) == {name: f"{values[name]:.2f}" for name in header[3:-1]}
    report = json.loads((tmp_path / "4b-without-CSC-seed-0" / "report-val.json").read_text())
    assert report["seg"]["miou"] == values["seg"]
    assert (tmp_path / "4b-val.png").is_file() == ("4b-val.png: matplotlib" not in printed)

    ablate.main(table)
    assert capsys.readouterr().out.count("finished before") == 1
    assert (tmp_path / "4b-val.md").read_text() == markdown


@pytest.mark.slow
def test_what_cannot_be_trained_is_told_with_its_reason_and_the_rest_is_kept(tmp_path, capsys):
    table = ["--table", "4b", *TINY, "--train_split", "nowhere", "--rows", "with CSC", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        ablate.main(table)
    printed = capsys.readouterr().out
    assert "FAILED with CSC, seed 0: " in printed
    assert "nowhere" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "9"), "invalid choice: '9'"),
        (("--table", "4b", "--rows", "no CSC"), r"unknown rows \['no CSC'\]; the table has \['with CSC'"),
        (("--table", "4b", "--max_stepz", "3"), "max_stepz"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, message, tmp_path, complaint):
    said = complaint(ablate.main, "--recipe", "shapes-tiny", *arguments, "--output_dir", tmp_path / "runs")
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()
