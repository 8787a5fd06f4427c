"""research/figures.py as a user runs it, on runs that were written and not trained."""

import csv
import json
import shutil

import figures
import pytest
from tiny import save_segformer, square, tiny_cosa

from cosa_hf.data import SHAPES_CLASSES, SHAPES_COEXISTENCE, load_shapes
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.inference import Segmenter
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.snapshots import save_networks, snapshot_directory

QUICK = ("--dataset", "shapes", "--num_images", "4", "--scales", "1", "--no_flip")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of 20 steps, one with SA and a snapshot, one without; xi moves from 0.3 to 0.6."""
    directory = tmp_path_factory.mktemp("runs")
    networks = [tiny_cosa(seed=seed, coexistence_classes=list(SHAPES_COEXISTENCE)) for seed in range(4)]
    for name, swapping in (("with", True), ("without", False)):
        run = directory / name
        run.mkdir()
        TrainingConfig(
            max_steps=20, warmup_steps=0, lr_warmup_steps=0, swapping_assignments=swapping, perplexity_epsilon=0.5
        ).to_yaml(run / "recipe.yaml")
        lines = [{"step": 10, "xi": 0.3, "aux_xi": 0.4}, {"step": 20, "xi": 0.6, "aux_xi": 0.7}]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "run.json").write_text("{}")
        save_networks(run, *networks[:2], square(64))
    save_networks(snapshot_directory(directory / "with", 10), *networks[2:], square(64))
    return directory


def draw(output_dir, figure, *models, data=QUICK):
    """The rows that the command writes."""
    figures.main([*map(str, models), *data, "--figure", figure, "--output_dir", str(output_dir)])
    return list(csv.DictReader((output_dir / f"figure-{figure}.csv").open()))


def report_of(run, **settings):
    """What evaluation says of the run's assignment network on the same four images."""
    segmenter = Segmenter.from_pretrained(run / "assignment", device="cpu")
    return evaluate(segmenter, load_shapes("val", num_images=4, masks=True), progress=False, **settings)


def test_networks_over_time_as_a_user_asks_for_them(runs, tmp_path, capsys):
    rows = draw(tmp_path / "new", "6", *runs.iterdir())
    printed = capsys.readouterr().out.splitlines()
    assert {(row["run"], row["step"], row["network"], row["labels"]) for row in rows} == {
        (run, step, network, labels)
        for run, step in (("with", "10"), ("with", "20"), ("without", "20"))
        for network in ("online", "assignment")
        for labels in ("SPL", "CPL")
    }
    assert printed[0].split() == ["run", "step", "network", "labels", "miou"]
    assert len(printed) == 1 + len(rows) + 2
    assert f"{tmp_path}/new/figure-6.png" in printed[-1]

    report = report_of(runs / "with", cam_threshold=0.6)
    found = {(row["step"], row["network"], row["labels"]): row["miou"] for row in rows if row["run"] == "with"}
    assert float(found["20", "assignment", "SPL"]) == pytest.approx(report["seg_tags"]["miou"], abs=0.05)
    assert float(found["20", "assignment", "CPL"]) == pytest.approx(report["cam"]["miou"], abs=0.05)


@pytest.mark.parametrize("figure", ["3", "4", "7"])
def test_a_run_is_looked_at_through_the_network_that_labelled_it(figure, runs, tmp_path):
    rows = draw(tmp_path, figure, f"SA={runs / 'with'}", f"no SA={runs / 'without'}")
    assert {(row["run"], row["step"], row["network"]) for row in rows} == {
        ("SA", "10", "assignment"),
        ("SA", "20", "assignment"),
        ("no SA", "20", "online"),
    }
    if figure == "3":
        assert {(row["step"], row["threshold"]) for row in rows} == {("10", "0.3"), ("20", "0.6")}
    if figure == "7":
        assert [row["image_id"] for row in rows[:4]] == [f"val-0000{number}" for number in range(4)]


def test_coexistence_is_the_end_of_the_run_as_evaluation_has_it(runs, tmp_path):
    (row,) = draw(tmp_path, "4b", runs / "with")
    assert row["step"] == "20"
    report = report_of(runs / "with")["cam"]
    assert float(row["miou"]) == pytest.approx(report["miou"], abs=0.05)
    assert float(row["c_miou"]) == pytest.approx(report["coexistence_miou"], abs=0.05)


@pytest.mark.parametrize("published", [False, True])
def test_a_single_model_has_no_time_and_its_own_threshold(published, runs, tmp_path):
    model = runs / "with" / "online"
    if published:  # with its recipe
        model = shutil.copytree(model, tmp_path / "online")
        shutil.copy(runs / "with" / "recipe.yaml", model)
    rows = draw(tmp_path, "3", model)
    assert {(row["run"], row["step"], row["network"], row["threshold"]) for row in rows} == {
        ("online", "0", "model", "0.5")
    }


@pytest.mark.parametrize("classes", [(), ("--classes", *SHAPES_CLASSES)])
def test_a_folder_is_read_with_the_classes_of_the_model_or_those_given(classes, runs, tmp_path):
    lines = ["file_name,mask_file_name,labels,split"]
    for row in load_shapes("val", num_images=2, masks=True):
        row["image"].save(tmp_path / f"{row['image_id']}.png")
        row["mask"].save(tmp_path / f"{row['image_id']}_mask.png")
        tags = ";".join(SHAPES_CLASSES[label] for label in row["labels"])
        lines.append(f"{row['image_id']}.png,{row['image_id']}_mask.png,{tags},val")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    folder = ("--dataset", "folder", "--data_dir", str(tmp_path), *classes, "--scales", "1", "--no_flip")
    rows = draw(tmp_path / "out", "7", runs / "with" / "online", data=folder)
    assert [row["image_id"] for row in rows] == ["val-00000", "val-00001"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("nowhere",), "error: no directory nowhere"),
        (("with", "with"), r"error: both .*with and .*with are called 'with'; call one of them NAME="),
        (("with/snapshots",), "error: with/snapshots is neither a model, with a config.json, nor a finished run"),
    ],
)
def test_mistakes_are_named(models, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit, match=message):
        draw(tmp_path / "none", "3", *models)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("place", ["file", "directory"])
def test_a_place_that_cannot_be_written_is_refused_first(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "directory/figure-3.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"error: cannot write \S*figure-3\.(csv|png): "):
        draw(tmp_path / place, "3", "no-model-is-needed-to-see-that")


def test_a_network_without_cams_is_refused(tmp_path):
    save_segformer(tmp_path / "segformer", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
    with pytest.raises(SystemExit, match="error: a SegformerForSemanticSegmentation only segments and has no CAMs"):
        draw(tmp_path / "out", "3", tmp_path / "segformer")


@pytest.mark.parametrize(
    ("figure", "files", "expected"),
    [
        ("1a", {"report-val.json": {"cls_map": 91.5, "images": 4, "protocol": {"split": "val"}}}, {"cls_map": "91.5"}),
        ("9", {}, {"step": "10", "xi": "0.3", "aux_xi": "0.4"}),
    ],
)
def test_figures_of_records_need_no_dataset(figure, files, expected, runs, tmp_path, capsys):
    run = shutil.copytree(runs / "with", tmp_path / "guided")
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    rows = draw(tmp_path / "out", figure, run, f"again={run}", data=())
    assert expected.items() <= rows[0].items()
    assert {row["run"] for row in rows} == {"guided", "again"}
    assert "figure-" in capsys.readouterr().out


def test_a_figure_of_images_needs_a_dataset(runs, tmp_path):
    with pytest.raises(SystemExit, match="error: figure 3 is measured on images: name a --dataset"):
        draw(tmp_path, "3", runs / "with", data=())


def test_a_table_is_printed_with_its_numbers_to_the_right():
    rows = [{"run": "CoSA", "miou": 76.19}, {"run": "no CSC", "miou": None}]
    assert figures.format_table(rows) == "run      miou\nCoSA    76.19\nno CSC      -"
