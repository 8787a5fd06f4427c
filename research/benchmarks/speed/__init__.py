"""Where the time of a training step goes, and what it is compared with; research/benchmark.py runs it."""
