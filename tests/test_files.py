import functools
import os

import pytest
from safetensors import SafetensorError

from cosa_hf.files import CONFIG, check_output, file_name, remove_unfinished, whole_file, whole_model


def test_what_is_there_is_not_written_over(tmp_path):
    """A file, or a directory that holds something; a hidden file, such as a file manager's, is nothing."""
    report, panels = tmp_path / "report.json", tmp_path / "panels"
    panels.mkdir()
    (panels / ".DS_Store").touch()
    check_output(report, instead="choose another --report")
    check_output(panels, directory=True)
    report.touch()
    (panels / "1.png").touch()
    with pytest.raises(FileExistsError, match=r"report\.json is there already: choose another --report, or"):
        check_output(report, instead="choose another --report")
    with pytest.raises(FileExistsError, match=r"1\.png is there already: choose another name, or remove \S*panels$"):
        check_output(panels, directory=True)
    check_output(report, replace=True)


@pytest.mark.parametrize(
    ("path", "advice", "followed"),
    [
        ("report.json", "is there already: choose another name, or remove", "other.json"),
        ("report.json", "is there already: choose another name, or remove", "report.json"),
        ("report.json/new.json", "report.json is a file; choose another name", "new.json"),
        ("panels", "panels is a directory; choose another name", "panels/new.json"),
        ("locked/new.json", "no permission to write .*locked; choose another place", "panels/new.json"),
    ],
)
def test_what_an_error_advises_works(path, advice, followed, tmp_path, monkeypatch):
    (tmp_path / "report.json").touch()
    for name in ("panels", "locked"):
        (tmp_path / name).mkdir()
    allowed = os.access  # a superuser may write everywhere
    monkeypatch.setattr(os, "access", lambda place, mode: place.name != "locked" and allowed(place, mode))
    with pytest.raises(OSError, match=advice):
        check_output(tmp_path / path)
    if followed == path:
        (tmp_path / path).unlink()
    check_output(tmp_path / followed)


@pytest.mark.parametrize("end", ["", "ü" * 200])
def test_every_id_has_a_file_name_of_its_own(end, tmp_path):
    ids = [f"{start}{end}" for start in ("cats/1", "cats_1", "cats 1", "cats%2F1", "cats\\1", "CATS")]
    names = [file_name(each, ".png") for each in ids]
    assert len(set(names)) == len(ids)
    for name in names:
        (tmp_path / name).touch()
        assert name.endswith(".png")


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "mask.png"
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        assert not path.exists()
        assert unfinished.parent == tmp_path  # renaming is instant only within a file system
    assert path.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), whole_file(path) as unfinished:
        unfinished.write_text(b"new")  # opens the file and then refuses
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_at_the_limit_of_the_file_system_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 125 + ".png")
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"x")
    assert path.exists()


def test_what_killed_processes_left_is_removed_everywhere(tmp_path):
    (tmp_path / "below").mkdir()
    directories = (tmp_path, tmp_path / "below")
    contexts = [whole_file(directory / "mask.png") for directory in directories]  # never left, as in a killed process
    for context, directory in zip(contexts, directories, strict=True):
        context.__enter__().write_bytes(b"half")
        (directory / "other.png").write_bytes(b"whole")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["other.png", "other.png"]


def test_a_model_is_there_when_all_of_it_is(tmp_path):
    """Saved for the first time, over an empty directory and over another model; what else lies there stays."""
    model = tmp_path / "model"
    for number in "12":
        with whole_model(model) as unfinished:
            for name in (CONFIG, "model.safetensors"):
                (unfinished / name).write_text(number)
            before = sorted(path.name for path in model.iterdir() if path != unfinished)
            assert before == ([] if number == "1" else [CONFIG, "mine.txt", "model.safetensors"])
        (model / "mine.txt").touch()
    assert {path.name: path.read_text() for path in model.iterdir()} == {
        CONFIG: "2", "model.safetensors": "2", "mine.txt": "",
    }  # fmt: skip
    with pytest.raises(TypeError), whole_model(tmp_path / "broken") as unfinished:
        (unfinished / CONFIG).write_text(b"new")  # opens the file and then refuses
    assert list((tmp_path / "broken").iterdir()) == []


@pytest.mark.parametrize("whole", [whole_file, whole_model])
@pytest.mark.parametrize("error", [functools.partial(OSError, 28), SafetensorError])
def test_what_could_not_be_written_is_named(whole, error, tmp_path):
    with pytest.raises(OSError, match="No space") as raised, whole(tmp_path / "model"):
        raise error("No space left on device")
    assert str(tmp_path / "model") in str(raised.value)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_saving_a_model_goes_on_after_a_kill_at_any_file(moved, tmp_path):
    """Some of the files are in their places then: the directory is not empty, and yet not to be refused."""
    model, names = tmp_path / "model", ["model.safetensors", "preprocessor_config.json", CONFIG]
    killed = whole_model(model)  # never left
    unfinished = killed.__enter__()
    for name in names:
        (unfinished / name).write_text("half")
    for name in names[:moved]:
        (unfinished / name).replace(model / name)
    assert not (model / CONFIG).exists()
    check_output(model, directory=True)
    with whole_model(model) as unfinished:
        for name in names:
            (unfinished / name).write_text("whole")
    assert {path.name: path.read_text() for path in model.iterdir()} == dict.fromkeys(names, "whole")
    (model / ".killed.unfinished").mkdir()  # before it was removed
    with pytest.raises(FileExistsError, match="is there already"):
        check_output(model, directory=True)
