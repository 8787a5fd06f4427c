# Everything happens in .venv inside the clone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all lint format docs demo-model

setup: .venv/ready

.venv/ready: pyproject.toml
	@echo "Installing into .venv: torch and all, some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Once more beside the first: make demo OUTPUT_DIR=runs/again
OUTPUT_DIR := runs/demo
demo: setup
	$(BIN)/cosa-hf demo --output_dir $(OUTPUT_DIR)

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-all: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m mkdocs build --strict

# Replaces the model that cosa_hf.demo_model() returns: make demo-model MODEL=runs/student/model VOC=VOC2012
# MODEL lies in its run's directory, VOC has the list val_report (research/notes/student.md).
DEMO := src/cosa_hf/demo/model
CARD := cosa-ms-lite0-voc-1696
demo-model: setup
	rm -rf build/demo && mkdir -p build/demo
	cp $(MODEL)/../recipe.yaml $(MODEL)/../run.json build/demo
	$(BIN)/cosa-hf export $(MODEL) build/demo/model --format half
	$(BIN)/cosa-hf evaluate build/demo/model --dataset voc --data_dir $(VOC) --split val_report \
	    --report build/demo/report.json
	$(BIN)/cosa-hf push build/demo/model --repo_id $(CARD) --report build/demo/report.json \
	    --notes model_cards/demo-notes.md --license other --dry_run build/demo/card
	cd build/demo/card && install -D -m 644 -t ../../../$(DEMO) README.md config.json model.safetensors \
	    preprocessor_config.json recipe.yaml
	sed 's|](recipe.yaml)|](../$(DEMO)/recipe.yaml)|' $(DEMO)/README.md > model_cards/$(CARD).md
