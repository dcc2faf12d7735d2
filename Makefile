# make demo · make test · make check · make bench. Every target sets up .venv by itself when it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Several processes share few cores here: an OpenMP pool that spins while it waits makes everything several times slower.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 3000

.PHONY: setup demo test test-slow check bench bench-peers leaderboard clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing into $(VENV), about a minute ..."
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup        ## the whole loop on the embedded world
	$(BIN)/vlbench demo

test: setup        ## style, types and behaviour, under 12 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: setup   ## the checks that take minutes: five random kills, three seeds, real photographs
	$(BIN)/python -m pytest -m slow

check: setup       ## ruff and mypy
	$(BIN)/ruff check vlbench tests benchmarks
	$(BIN)/ruff format --check vlbench tests benchmarks
	$(BIN)/mypy

leaderboard: setup
	$(BIN)/vlbench leaderboard

bench: setup       ## speed and footprint
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/train_throughput.py

bench-peers: setup ## beside CLIP_benchmark and scikit-learn, and retrieval at scale; minutes to half an hour each
	$(BIN)/python benchmarks/eval_vs_clip_benchmark.py
	$(BIN)/python benchmarks/probe_vs_sklearn.py
	$(BIN)/python benchmarks/probe_vs_sklearn.py --classes 100 --max-sklearn-seconds 900
	$(BIN)/python benchmarks/retrieval_scale.py

clean:
	rm -rf $(VENV) demo runs
