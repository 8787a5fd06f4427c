"""research/threshold.py on a few crops, with a small random model."""

import threshold

from cosa_hf.data import load_shapes


def test_both_cams_are_scored_at_every_threshold_and_at_those_of_both_mixtures(model_dir, monkeypatch, capsys):
    few = load_shapes("train", num_images=4, masks=True)
    monkeypatch.setattr(threshold, "load_dataset_by_name", lambda *_, **__: few)
    threshold.main([str(model_dir), "--recipe", "shapes-tiny", "--images", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["M':", "fixed", "full", "tied", "M†':", "fixed", "full", "tied"]
    assert lines[1].count(":") == len(threshold.FIXED)
