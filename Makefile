# make demo        set everything up in .venv, then run the main job on real data
# make test        set everything up in .venv, then run all tests
# make test-fast   all tests but those marked slow: some of every folder, in about a minute
# make test-matrix the fast tests with the oldest and with the newest torch and lightning, in .matrix; it downloads several
#                  GB unless PIP_EXTRA_INDEX_URL names an index of CPU builds of torch. MATRIX_TESTS: only these tests
# make fuzz        many random models and data against autograd; FUZZ_EXAMPLES=1000 by default
# make lint        ruff, mypy and the import contracts
# make docs        the documentation as HTML, in docs/_build
PYTHON ?= python3
FUZZ_EXAMPLES ?= 1000
MATRIX_TESTS ?= tests
BIN := .venv/bin
# Python compiles what is imported, when it is first imported. Most modules never are.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
# Two processes each take half of the tests, and then what the other has left, so that most fixtures are made once. Each
# gets one thread: more would only wait for each other.
PYTEST := -m pytest --numprocesses 2 --dist worksteal

.PHONY: demo test test-fast test-matrix fuzz lint docs clean

demo: .venv/.demo
	$(BIN)/python -m examples.digits --out demo_output

test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-fast: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

# Both ends run, and then it fails if one has failed.
test-matrix: .matrix/oldest/.done .matrix/newest/.done
	failed=0; for end in oldest newest; do \
	  .matrix/$$end/bin/python -c "import lightning, torch; print('$$end: torch', torch.__version__, 'lightning', lightning.__version__)"; \
	  OMP_NUM_THREADS=1 .matrix/$$end/bin/python $(PYTEST) $(MATRIX_TESTS) -m "not slow" || failed=1; \
	done; exit $$failed

# The newest versions are those that pip finds: touch pyproject.toml to look again.
.matrix/%/.done: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv --clear .matrix/$*
	awk -F== 'NR == FNR { varied[$$1]; next } !($$1 in varied)' constraints-oldest.txt constraints.txt > .matrix/$*/constraints.txt
	test $* = newest || cat constraints-oldest.txt >> .matrix/$*/constraints.txt
	.matrix/$*/bin/python $(INSTALL) --constraint .matrix/$*/constraints.txt --editable ".[test]"
	touch $@

fuzz: .venv/.test
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python $(PYTEST) tests/fuzz

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.docs
	rm -rf docs/api/generated
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv .matrix demo_output docs/_build docs/api/generated
