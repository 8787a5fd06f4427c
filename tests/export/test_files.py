import pytest

from cosa_hf.export.files import remove_unfinished, whole_file


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
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_bytes(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_at_the_limit_of_the_file_system_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 125 + ".png")
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"x")
    assert path.exists()


def test_what_killed_processes_left_is_removed_everywhere(tmp_path):
    (tmp_path / "below").mkdir()
    for directory in (tmp_path, tmp_path / "below"):
        context = whole_file(directory / "mask.png")
        context.__enter__().write_bytes(b"half")  # never left, as in a killed process
        (directory / "other.png").write_bytes(b"whole")
        leftovers = [path for path in directory.iterdir() if path.name.startswith(".")]
        assert len(leftovers) == 1
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["other.png", "other.png"]
