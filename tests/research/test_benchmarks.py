"""The scripts of research/benchmarks/."""

import sys

import pytest
from benchmarks import frozen, separation_memory, variants
from in_process import run_script


@pytest.fixture
def lines(capsys):
    """The lines that the `main` of a script prints."""

    def lines(script, *arguments):
        script.main([*arguments])
        return capsys.readouterr().out.splitlines()

    return lines


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_grows_with_tokens_not_pairs(subprocess_of):
    # The peak memory of a process counts from that of the one that started it.
    run = subprocess_of("--tokens", 1024, 4096, launch=(separation_memory.__file__,))
    assert run.returncode == 0, run.stderr
    peaks = [float(line.split("|")[2]) for line in run.stdout.splitlines()[2:]]
    # Four times the tokens: about four times the memory, not sixteen.
    assert 0 < peaks[1] < 6 * peaks[0]


def test_a_number_of_tokens_that_makes_no_square_map_is_refused(complaint):
    assert "1000 is not a square number" in complaint(separation_memory.main, "--tokens", "1000")


@pytest.mark.slow
def test_variants_are_compared_with_the_first_of_them(lines):
    shown = lines(variants, "--only", "AdamW", "EMA", "stride", "--rounds", "1")
    rows = [line.split(" | ") for line in shown[4:]]
    assert [row[1] for row in rows] == [
        *("a loop", "foreach", "fused", "a loop", "foreach", "stride 1", "stride 2", "stride 4"),
    ]
    assert [row[3] for row in rows if row[1] in ("a loop", "stride 1")] == ["1.00 x"] * 3


@pytest.mark.slow
def test_fp16_trains_on_a_cpu(tmp_path, monkeypatch, any_precision):
    flags = (
        "--recipe shapes-tiny --backbone test_vit --aux_layer -2 --crop_size 48 --input_size 48 --batch_size 2 "
        "--num_workers 0 --max_steps 2 --warmup_steps 1 --lr_warmup_steps 1 --eval_every 0 --tracker none "
        "--decoder_channels 16"
    )
    run_script(monkeypatch, "research/benchmarks/fp16_on_cpu.py", *flags.split(), "--output_dir", tmp_path)
    assert "mixed_precision: fp16" in (tmp_path / "recipe.yaml").read_text()
    assert (tmp_path / "assignment/model.safetensors").is_file()


@pytest.mark.slow
def test_a_frozen_encoder_is_timed_beside_a_bare_one(lines):
    small = ("--backbone", "test_vit", "--affinity_blocks", "-2", "--frozen_blocks", "5")
    shown = lines(frozen, *small, "--size", "64", "--images", "20", "--steps", "2")
    assert [line.split(" | ")[0] for line in shown if line.startswith("| ")] == [
        "| encoding", "| timm, bare", "| F and F†", "| F, F† and attention", "| training step", "| encodes its images",
        "| reads cached features",
    ]  # fmt: skip
    assert any("reading 20 images of a cache" in line for line in shown)
