# Two commands for a newcomer: `make demo` and `make test`. Each sets up all it needs, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-output

.PHONY: demo test test-slow check help
help:
	@echo "make demo       encode and decode the sample photographs on a local Ray"
	@echo "make test       the fast tests"
	@echo "make test-slow  the slow ones"
	@echo "make check      ruff, mypy and the rules of the rooms"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --config-settings editable_mode=compat --editable '.[dev,peers,train]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/latentmill encode examples/photos --to $(DEMO)/latents --vae demo --resolution 256
	$(BIN)/latentmill decode $(DEMO)/latents --to $(DEMO)/previews
	$(BIN)/latentmill stats $(DEMO)/latents
	@echo
	@echo "Look at the contact sheet:  $(CURDIR)/$(DEMO)/previews/sheets/00000.png"
	@echo "The statistics:             $(CURDIR)/$(DEMO)/latents/stats.json"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not ray' --timeout 600 -n auto --maxprocesses 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and ray' --timeout 600

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
