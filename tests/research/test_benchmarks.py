"""The scripts of research/benchmarks/ as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "research" / "benchmarks"


def benchmark(name, *arguments):
    command = [sys.executable, BENCHMARKS / name, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_grows_with_tokens_not_pairs():
    run = benchmark("separation_memory.py", "--tokens", "1024", "4096")
    assert run.returncode == 0, run.stderr
    peaks = [float(line.split("|")[2]) for line in run.stdout.splitlines()[2:]]
    # Four times the tokens: about four times the memory, not sixteen.
    assert 0 < peaks[1] < 6 * peaks[0]


def test_a_number_of_tokens_that_makes_no_square_map_is_refused():
    run = benchmark("separation_memory.py", "--tokens", "1000")
    assert run.returncode == 2
    assert "1000 is not a square number" in run.stderr


@pytest.mark.slow
def test_variants_are_compared_with_the_first_of_them():
    run = benchmark("variants.py", "--only", "AdamW", "EMA", "stride", "--rounds", "1")
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines()[4:]]
    assert [row[1] for row in rows] == [
        "a loop",
        "foreach",
        "fused",
        "a loop",
        "foreach",
        "stride 1",
        "stride 2",
        "stride 4",
    ]
    assert [row[3] for row in rows if row[1] in ("a loop", "stride 1")] == ["1.00 x"] * 3


@pytest.mark.slow
def test_fp16_trains_on_a_cpu(tmp_path):
    flags = (
        "--recipe shapes-tiny --backbone test_vit --aux_layer -2 --crop_size 48 --input_size 48 --batch_size 2 "
        "--num_workers 0 --max_steps 2 --warmup_steps 1 --lr_warmup_steps 1 --eval_every 0 --tracker none"
    )
    run = benchmark("fp16_on_cpu.py", *flags.split(), "--output_dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "mixed_precision: fp16" in (tmp_path / "recipe.yaml").read_text()
    assert (tmp_path / "assignment/model.safetensors").is_file()


@pytest.mark.slow
def test_a_frozen_encoder_is_timed_beside_a_bare_one():
    small = ("--backbone", "test_vit", "--affinity_blocks", "-2", "--frozen_blocks", "5")
    small += ("--size", "64", "--images", "20", "--steps", "2")
    run = benchmark("frozen.py", *small)
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        "| encoding", "| timm, bare", "| F and F†", "| F, F† and attention", "| training step", "| encodes its images",
        "| reads cached features",
    ]  # fmt: skip
    assert "reading 20 images of a cache" in run.stdout
