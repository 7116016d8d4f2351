# Python 3.11 or newer and make are enough: each target makes its own set-up in .venv.
#   make demo     find the components behind a behaviour of the bundled model, and write a report
#   make test     linters, types, import contract, and the tests at their smallest useful sizes
#   make verify   the same at full size, with notebooks, circuits and a short run of the benchmarks
#   make bench    measurements against peers, written to benchmarks/results
#   make agreement-benchmark   which methods point at the noun that decides the verb: table and figure
#   make steering-table        builders of steering vectors under operators, at one price: table and figure
#   make clean    remove what these made
PYTHON ?= python3
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS
export HF_HUB_OFFLINE = 1

BIN := .venv/bin
INSTALLED := .venv/mechattr-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test verify bench agreement-benchmark steering-table check clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/mechattr localise --model tiny --task ioi --out out/demo

test: check
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4
	$(BIN)/python -m pytest -q --nbmake --timeout 600 notebooks/first_patch.ipynb

verify: check
	$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 1800 --hypothesis-profile full
	$(BIN)/python -m pytest -q --nbmake --timeout 900 notebooks
	for task in ioi greater_than subject_verb gendered_pronoun induction; do $(BIN)/python -m circuits.$$task || exit 1; done
	$(BIN)/python -m benchmarks --smoke
	$(BIN)/python -m benchmarks.localisation --quick
	$(BIN)/python -m circuits.agreement_benchmark --quick
	$(BIN)/python -m benchmarks.steering_table --quick

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

agreement-benchmark: $(INSTALLED)
	$(BIN)/python -m circuits.agreement_benchmark

steering-table: $(INSTALLED)
	$(BIN)/python -m benchmarks.steering_table

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv out build dist mechattr.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# torch goes first, alone and pinned, so that nothing that comes later can choose another build of it.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation -e '.[dev,ray]'
	touch $@
