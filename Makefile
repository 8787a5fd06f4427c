# Everything happens in .venv inside the clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow lint format

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py --output_dir runs/demo

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
