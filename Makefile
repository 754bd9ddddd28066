# make demo   install into .venv and ask the built-in model a few questions
# make test   install the test tools too and run every check
# make clients   lm-evaluation-harness against the server; installs another half gigabyte
# The other targets are for developers; see CONTRIBUTING.md.

VENV ?= .venv
BIN := $(VENV)/bin
# The first Python that is new enough; to choose: make PYTHON=python3.12 demo
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# So that the first start need not.
COMPILE_LOOPS := $(BIN)/python -c 'import argosy.kernels.loops'
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

# Tests start a hundred programs, each of which would compile argosy anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check lint pytest schemathesis slow clients bench eval validate clean

demo: $(RUN_STAMP)
	$(BIN)/argosy demo

test: check

# At once: mypy keeps one core busy, for a minute.
check: $(TEST_STAMP)
	$(MAKE) --no-print-directory --jobs=2 lint pytest

lint: $(TEST_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

# Two workers with one thread each: torch's own threads would make them fight for the cores. Tests of many ranks that
# compute come apart from those that start programs and mostly wait: deadlines are for the latter alone. A file's tests
# share what is slow to start, so one worker runs them.
pytest: $(TEST_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not slow and not cuda and not processes" --ignore=tests/dist
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not cuda and not processes" tests/dist
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "processes and not slow and not cuda"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/kernels/test_row_ops.py tests/kernels/test_*_triton.py

# The API against its own description; a tool with libraries of its own, so not part of the test extra.
schemathesis: $(TEST_STAMP)
	$(PIP_INSTALL) schemathesis==4.32.5
	$(BIN)/pytest -q tests/server/test_api_description.py

slow: $(TEST_STAMP)
	$(BIN)/pytest -q -m "slow and not cuda"

clients: $(TEST_STAMP)
	$(PIP_INSTALL) --editable '.[test,train,clients]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/clients

bench: $(RUN_STAMP)
	$(BIN)/argosy bench

eval: $(RUN_STAMP)
	$(BIN)/argosy eval

validate: $(TEST_STAMP)
	$(BIN)/argosy validate

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is renewed when what it installed has changed; --editable makes source changes need no reinstallation.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	$(COMPILE_LOOPS)
	touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[test,train]'
	$(COMPILE_LOOPS)
	touch $@ $(RUN_STAMP)

clean:
	rm -rf $(VENV) build dist argosy.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
