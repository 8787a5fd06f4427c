"""The cache of a frozen encoder's features: what is in it, what it refuses, and what a killed writer leaves."""

import json
import multiprocessing
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from in_process import run_command

from cosa_hf.training import features
from cosa_hf.training.features import FeatureStore, clear

SHAPES = {"tokens": (2, 4, 3), "attention": (4, 4)}
MADE_BY = {"encoder": "abc", "size": 64, "layers": [9]}


def store_in(root, **changes):
    return FeatureStore(root, MADE_BY | changes, SHAPES)


def maps_of(value):
    return {name: torch.full(shape, float(value)) for name, shape in SHAPES.items()}


def test_what_is_written_is_read(tmp_path):
    store = store_in(tmp_path)
    written = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    store.write("a", written)
    store.write("b", maps_of(2))
    for reader in (store, store_in(tmp_path)):
        assert reader.missing(["b", "c", "a", "c"]) == ["c"]
        for name, values in reader.read("a").items():
            assert torch.equal(values, written[name].half())
        assert reader.read("b")["attention"].sum() == 32
    with pytest.raises(KeyError):
        store.read("c")
    assert store.bytes_per_image == 2 * (24 + 16)


@pytest.mark.parametrize("change", [{"encoder": "abd"}, {"size": 96}, {"layers": [8]}, {"views": ["plain"]}])
def test_records_of_other_settings_are_not_served(tmp_path, change):
    store_in(tmp_path).write("a", maps_of(1))
    assert store_in(tmp_path, **change).missing(["a"]) == ["a"]
    assert FeatureStore(tmp_path, MADE_BY, SHAPES | {"attention": (9, 9)}).missing(["a"]) == ["a"]
    assert store_in(tmp_path).missing(["a"]) == []


def test_several_writers_and_readers_share_it(tmp_path):
    one, other, reader = (store_in(tmp_path) for _ in range(3))
    for number in range(5):
        one.write(f"one-{number}", maps_of(number))
        other.write(f"other-{number}", maps_of(10 + number))
    keys = [f"{name}-{number}" for number in range(5) for name in ("one", "other")]
    assert reader.missing(keys) == []
    assert [reader.read(key)["tokens"][0, 0, 0].item() for key in keys] == [
        offset + number for number in range(5) for offset in (0, 10)
    ]


def write_on(root, written):
    store = store_in(root)
    for number in range(100_000):
        store.write(str(number), maps_of(number % 1000))
        written.value = number


def test_a_killed_writer_leaves_complete_records(tmp_path):
    fork = multiprocessing.get_context("fork")
    for count in (1, 20, 57):
        written = fork.Value("i", -1)
        process = fork.Process(target=write_on, args=(tmp_path / str(count), written))
        process.start()
        while written.value < count:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        store = store_in(tmp_path / str(count))
        keys = [str(number) for number in range(100_000)]
        done = sorted(set(keys) - set(store.missing(keys)))
        assert len(done) > count
        for key in done:
            assert (store.read(key)["tokens"] == int(key) % 1000).all()
        store.write("more", maps_of(7))
        assert store_in(tmp_path / str(count)).read("more")["attention"].sum() == 7 * 16


def test_what_an_interrupted_write_left_is_written_over(tmp_path):
    store = store_in(tmp_path)
    store.write("a", maps_of(1))
    (data,) = store.directory.glob("*.f16")
    with data.open("ab") as file:
        file.write(b"half a record")
    (lines,) = store.directory.glob("*.jsonl")
    with lines.open("a") as file:
        file.write('["b", ')
    assert store_in(tmp_path).missing(["a", "b"]) == ["b"]
    with lines.open("w") as file:  # a line that points behind the records
        file.write('["a", 0]\n["b", 5]\n')
    assert store_in(tmp_path).missing(["a", "b"]) == ["b"]


def test_a_full_disk_is_refused_beforehand(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(total=10_000, free=580))
    store.require_room(1)
    with pytest.raises(OSError, match=r"features of 2 images take 0.0 GB"):
        store.require_room(2)


def test_room_is_found_as_the_error_says(tmp_path, monkeypatch):
    """On another disk, or by removing old caches."""

    def usage(directory):
        used = sum(path.stat().st_size for path in tmp_path.glob("full/*/*.f16"))
        return SimpleNamespace(total=10_000, free=10_000 if "other" in directory.parts else 660 - used)

    monkeypatch.setattr(features.shutil, "disk_usage", usage)
    store_in(tmp_path / "full", size=96).write("a", maps_of(1))
    said = (
        r"name another disk with cache_features DIR, remove old caches \(cosa-hf (cache --clear --cache_dir .*)\), or"
    )
    with pytest.raises(OSError, match=said) as raised:
        store_in(tmp_path / "full").require_room(2)
    store_in(tmp_path / "other").require_room(2)
    assert run_command(*re.search(said, str(raised.value))[1].split()) == 0
    store_in(tmp_path / "full").require_room(2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_damaged_cache_is_named(tmp_path, text):
    store = store_in(tmp_path)
    (store.directory / "about.json").write_text(text)
    with pytest.raises(ValueError, match=rf"about.json is damaged .*: remove {store.directory}, it is made again"):
        store_in(tmp_path)
    shutil.rmtree(store.directory)
    store_in(tmp_path).write("a", maps_of(1))


def test_a_cache_of_another_version_is_named(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    about = json.loads((store.directory / "about.json").read_text()) | {"format": 0, "cosa_hf": "0.0.9"}
    (store.directory / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"written by cosa_hf 0.0.9, in another format: remove it, it is made again"):
        store_in(tmp_path)
    shutil.rmtree(store.directory)
    store_in(tmp_path).write("a", maps_of(1))


def test_maps_that_do_not_fit_are_refused(tmp_path):
    store = store_in(tmp_path)
    with pytest.raises(ValueError, match="the cache is of maps"):
        store.write("a", maps_of(1) | {"attention": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="not finite in float16"):
        store.write("a", maps_of(1e6))
    assert store.missing(["a"]) == ["a"]


def test_clear_removes_caches_and_nothing_else(tmp_path):
    store_in(tmp_path).write("a", maps_of(1))
    store_in(tmp_path, size=96).write("a", maps_of(1))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"a cat")
    assert clear(tmp_path) > 2 * 80
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert clear(tmp_path / "nothing") == 0


def _resident(root, queue):
    import psutil

    store = FeatureStore(root, MADE_BY, {"tokens": (500_000,)})
    keys = [str(number) for number in range(100)]
    assert store.missing(keys) == []
    before = psutil.Process().memory_info().rss
    for key in keys:
        store.read(key)
    queue.put(psutil.Process().memory_info().rss - before)


def test_reading_keeps_no_pages(tmp_path):
    """100 MB are read; what stays is a record or two."""
    store = FeatureStore(tmp_path, MADE_BY, {"tokens": (500_000,)})
    for number in range(100):
        store.write(str(number), {"tokens": torch.zeros(500_000)})
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_resident, args=(tmp_path, queue))
    process.start()
    assert queue.get(timeout=120) < 30e6
    process.join()


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    store.write("a", maps_of(1))
    monkeypatch.setattr(features.np, "concatenate", lambda parts: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        store.write("b", maps_of(2))
    assert store_in(tmp_path).missing(["a", "b"]) == ["b"]
