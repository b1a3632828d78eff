# make demo        set everything up in .venv, then run the main job on real data
# make test        set everything up in .venv, then run all tests
# make test-fast   all tests but those marked slow: some of every folder, in about a minute
# make fuzz        many random models and data against autograd; FUZZ_EXAMPLES=1000 by default
# make lint        ruff, mypy and the import contracts
# make docs        the documentation as HTML, in docs/_build
PYTHON ?= python3
FUZZ_EXAMPLES ?= 1000
BIN := .venv/bin

.PHONY: demo test test-fast fuzz lint docs clean

demo: .venv/.demo
	$(BIN)/python -m examples.digits --out demo_output

# One thread in each of two test processes: more would only wait for each other.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-fast: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not slow"

fuzz: .venv/.test
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz --numprocesses 2

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv demo_output docs/_build docs/api/generated
