# `make demo` and `make test` need Python >= 3.10 and nothing else: each sets up what it needs, once.

PYTHON ?= python3
BIN := .venv/bin

# The interpreter of `make test-oldest`: the oldest that pyproject.toml names.
PYTHON_OLDEST ?= python3.10
OLDEST := .venv-oldest

.PHONY: demo test test-slow test-oldest mutations lint bench build clean

demo: .venv/examples
	$(BIN)/python examples/quickstart.py

# The tests run side by side, so that further threads would only wait for each other, in processes that tests start, too.
test test-slow test-oldest: export OMP_NUM_THREADS := 1

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Long fuzzing; FXSTREAM_EXAMPLES sets the number of networks.
test-slow: .venv/test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The same tests on the oldest Python and the oldest releases of what fxstream depends on.
test-oldest: $(OLDEST)/test
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

# Small faults, drawn at random: does any test find them?
mutations: .venv/test
	$(BIN)/python tests/mutations.py --count 40 --seed 0

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python benchmarks/compare.py --models resnet18 --ways conventional fxstream --sizes 4096 --tiles 256 384 512 --repeats 2

# The sdist and the wheel, in dist/.
build: .venv/build
	$(BIN)/python -m build

.venv/test .venv/examples .venv/bench .venv/build: .venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# The minimum of each core dependency ("torch>=2.6") becomes its only allowed release ("torch==2.6").
$(OLDEST)/test: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON_OLDEST) -m venv $(OLDEST)
	sed -n '/^dependencies = /s/>=/==/gp' pyproject.toml | grep -o '[a-z]*==[0-9.]*' > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv $(OLDEST) dist
