"""Every example in a docstring of research/ runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

RESEARCH = Path(__file__).resolve().parents[2] / "research"
WITH_EXAMPLES = [
    ".".join(path.relative_to(RESEARCH).with_suffix("").parts)
    for path in sorted(RESEARCH.rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > found.failed == 0
