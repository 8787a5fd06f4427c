"""Settings that all tests share."""

import os

# Before torch is imported. Some tests fork, and the child of a process whose OpenMP threads have worked waits for them
# forever; the models of the tests are too small to gain from threads anyway.
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

# The same examples in every run: a check that fails now and then tells a contributor nothing about the change at hand.
settings.register_profile("same every run", deadline=None, derandomize=True, max_examples=60)
# Looks for new ones: pytest --hypothesis-profile search
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same every run")
