"""benchmarks/separation_memory.py as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "separation_memory.py"


def benchmark(*arguments):
    command = [sys.executable, BENCHMARK, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_grows_with_tokens_not_pairs():
    run = benchmark("--tokens", "1024", "4096")
    assert run.returncode == 0, run.stderr
    peaks = [float(line.split("|")[2]) for line in run.stdout.splitlines()[2:]]
    # Four times the tokens: about four times the memory, not sixteen.
    assert 0 < peaks[1] < 6 * peaks[0]


def test_a_number_of_tokens_that_makes_no_square_map_is_refused():
    run = benchmark("--tokens", "1000")
    assert run.returncode == 2
    assert "1000 is no square number" in run.stderr
