"""`cosa-hf cache`: what cached features take, and their removal."""

import torch
from in_process import run_command

from cosa_hf.training.features import FeatureStore


def test_caches_are_shown_and_removed(tmp_path, capsys):
    run_command("cache", "--cache_dir", tmp_path)
    assert f"no cached features in {tmp_path}" in capsys.readouterr().out
    store = FeatureStore(tmp_path, {"maps": {"backbone": "test_vit"}}, {"features": (2, 3)})
    store.write("photo", {"features": torch.zeros(2, 3)})
    run_command("cache", "--cache_dir", tmp_path)
    assert f"{store.directory}  test_vit" in capsys.readouterr().out
    assert store.directory.exists()
    (tmp_path / "project").mkdir()
    (tmp_path / "project/about.json").write_text("{}")  # somebody else's
    run_command("cache", "--cache_dir", tmp_path, "--clear")
    assert "removed 1 caches" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*")] == ["project", "about.json"]
