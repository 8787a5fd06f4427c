"""The splits that NEU_Seg is reported on."""

import csv

import neu_seg
import pytest


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "NEU_Seg"
    for name in ("images", "masks"):
        (directory / name).mkdir(parents=True)
    lines = ["file_name,labels,split,mask_file_name"]
    for split, count in {"train": 600, "test": 400}.items():
        lines += [
            f"images/{split}_{number}.jpg,scratches,{split},masks/{split}_{number}.png" for number in range(count)
        ]
    (directory / "metadata.csv").write_text("\n".join(lines))
    return directory


def test_training_stays_and_the_test_images_are_split(source, tmp_path, capsys):
    neu_seg.main([str(source), str(tmp_path / "neu")])
    rows = list(csv.DictReader((tmp_path / "neu" / "metadata.csv").read_text().splitlines()))
    before = list(csv.DictReader((source / "metadata.csv").read_text().splitlines()))
    for row, old in zip(rows, before, strict=True):
        assert row | {"split": old["split"]} == old
        assert row["split"] in (("train",) if old["split"] == "train" else ("tune", "report"))
    counts = {name: sum(row["split"] == name for row in rows) for name in ("train", "tune", "report")}
    assert capsys.readouterr().out == f"{counts}\n"
    assert counts["train"] == 600
    assert 100 < counts["report"] < 200  # every second one, less what the trial saw
    assert (tmp_path / "neu" / "images").resolve() == source / "images"


def test_a_directory_that_is_there_is_kept(source, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*is there already"):
        neu_seg.main([str(source), str(source)])
    assert not (source / "images").is_symlink()
