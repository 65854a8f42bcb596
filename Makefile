# A fresh machine with Python >= 3.10 and make: `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint browser zoo clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "genlab needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/genlab demo --out demo

test: install lint browser
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The report's sliders are tested in a headless Chromium: the machine's, else one is installed; without one those tests
# are skipped, and say so.
browser: install
	@for name in chromium chromium-browser google-chrome-stable google-chrome; do \
	command -v $$name >/dev/null && exit 0; done; \
	{ [ "$$(id -u)" = 0 ] && timeout 180 sh -c 'apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium' \
	>/dev/null; } \
	|| timeout 180 $(BIN)/python -m playwright install chromium \
	|| echo 'no Chromium could be installed: its tests will be skipped' >&2

zoo: install
	$(BIN)/python scripts/zoo.py

clean:
	rm -rf demo build dist *.egg-info
