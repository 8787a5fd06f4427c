"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import cosa_hf

MODULES = ["cosa_hf", *(found.name for found in pkgutil.walk_packages(cosa_hf.__path__, "cosa_hf."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_walk_finds_the_package():
    assert {"cosa_hf.inference", "cosa_hf.objective.separation", "cosa_hf.training.config"} <= set(MODULES)
