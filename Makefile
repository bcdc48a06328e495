# `make demo` and `make test` need Python >= 3.10 and nothing else: each sets up what it needs, once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint bench clean

demo: .venv/examples
	$(BIN)/python examples/quickstart.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Long fuzzing; FXSTREAM_EXAMPLES sets the number of networks.
test-slow: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python benchmarks/compare.py --models resnet18 --ways conventional fxstream --sizes 4096 --tiles 256 384 512 --repeats 2

.venv/test .venv/examples .venv/bench: .venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv
