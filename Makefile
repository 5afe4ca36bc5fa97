# `make check` is what CI runs, word for word.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Two threads of torch in each test process would fight over the cores.
export OMP_NUM_THREADS = 1

.PHONY: demo check lint test slow browser docs bench clean

# The main job on built-in data: about three and a half minutes, ends with a picture.
demo: $(VENV)/ready
	env -u OMP_NUM_THREADS $(BIN)/eclosion demo

check: lint test

lint: $(VENV)/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/ready-dev browser
	$(BIN)/pytest -n auto

# What takes longer than the default tests may; some minutes to half an hour.
slow: $(VENV)/ready-dev
	$(BIN)/pytest -m slow -n auto

docs: $(VENV)/ready-dev
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/ready-dev
	$(BIN)/python -m bench

# A browser to open the report in, and strace to inject faults; where they cannot be installed, their tests are skipped and say so.
browser:
	@command -v chromium >/dev/null && command -v strace >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium strace >/dev/null; } || \
	  echo "no chromium or strace here: the tests that need them will be skipped"

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/ready-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/ready

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache
