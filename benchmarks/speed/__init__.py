"""Where the time of a training step goes, and what it is compared with; scripts/benchmark.py runs it."""
