# Start with `make demo` and `make test`. Each target first installs its dependencies into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
DEMO := demo-output

.PHONY: demo test test-slow test-lowest check docs help
help:
	@echo "make demo        encode and decode the sample photos on a local Ray"
	@echo "make test        run the fast tests"
	@echo "make test-slow   run the slow tests"
	@echo "make test-lowest run the fast tests with the lowest versions that pyproject.toml permits"
	@echo "make check       run ruff, mypy, the layer rules, the prose check and the documentation build"
	@echo "make docs        build the documentation site into site/"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --config-settings editable_mode=compat --editable '.[dev,peers,train]'
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--no-build-isolation --config-settings editable_mode=compat --editable '.[docs]'
	touch $@

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/latentmill encode examples/photos --to $(DEMO)/latents --vae demo --resolution 256
	$(BIN)/latentmill decode $(DEMO)/latents --to $(DEMO)/previews
	$(BIN)/latentmill stats $(DEMO)/latents
	@echo
	@echo "Contact sheet:  $(CURDIR)/$(DEMO)/previews/sheets/00000.png"
	@echo "Statistics:     $(CURDIR)/$(DEMO)/latents/stats.json"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3

# The tests that start a Ray mostly wait, and clusters share ports. So they run one after the other, beside all others.
# Of these, the tests that use an S3 server run in one process, as each process would start a server.
test-slow: $(VENV)/installed
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'slow and not ray' --timeout 600 > $(VENV)/slow.log 2>&1 & others=$$!; \
	trap "kill $$others 2> /dev/null" EXIT; \
	$(BIN)/python -m pytest -m 'slow and ray' --timeout 600; ray=$$?; \
	wait $$others; others=$$?; cat $(VENV)/slow.log; exit $$((ray | others))

test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) -m tests.lowest_versions > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt torch setuptools
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt \
		--no-build-isolation --config-settings editable_mode=compat --editable '.[dev,peers,train]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 4

# --strict turns every warning, such as a broken link or a page outside the nav, into an error.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: $(VENV)/docs-installed docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell *.md docs examples/README.md jobs/options.py jobs/encode_options.py jobs/common_options.py
	$(BIN)/python -m pytest tests/test_layers.py tests/test_prose.py
