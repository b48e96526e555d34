# Two commands for everybody: `make demo` and `make test`. Both make .venv from Python 3.11 and the pinned constraints.
PYTHON ?= python3.11
VENV := .venv
# two files at a time; a test that computes, computes on one core, for its neighbour has the other
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15
# no bytecode ahead: of tens of thousands of modules a command imports a few thousand, and compiles those once
INSTALL := -m pip --disable-pip-version-check install -qq --no-compile
PIP := $(VENV)/bin/python $(INSTALL) --constraint constraints.txt
# a second environment, with transformers 4.57: architectures that have left transformers 5
LEGACY := .venv-legacy
PIP_LEGACY := $(LEGACY)/bin/python $(INSTALL) --constraint constraints-legacy.txt

.PHONY: demo test check test-slow test-soak test-outside test-cluster test-architectures test-legacy bench clean

demo: $(VENV)/.installed  ## prepare, train with two processes, evaluate, generate, report
	@bash launch/demo.sh

test: $(VENV)/.installed-dev check  ## lint, types, and the tests that fit into a quarter of an hour
	$(PYTEST) -m "not slow and not soak and not cluster and not outside and not architectures"

check: $(VENV)/.installed-dev  ## ruff, mypy, shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck launch/*.sh launch/*.sbatch tests/cluster/slurm.sh .ci/run

test-slow: $(VENV)/.installed-peers  ## what CI runs on top: README commands, real data, peers' opinions
	$(PYTEST) -m "slow and not soak"

test-soak: $(VENV)/.installed-dev  ## what repeats: every signal, every engine, kills as often as the README says; before a release
	$(PYTEST) -m soak

test-outside: $(VENV)/.installed-dev  ## trackers and pushes over kills, hangs and dead endpoints
	$(PYTEST) -m "outside and not soak"

test-cluster: $(VENV)/.installed-dev  ## jobs on a real Slurm of two nodes, started on this machine; needs root and Debian
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m cluster tests/cluster

WHICH := architectures
test-architectures: $(VENV)/.installed-dev  ## every architecture of the guide that transformers 5 has, by two processes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "$(WHICH)" tests/architectures

test-legacy: $(LEGACY)/.installed  ## the same with transformers 4.57, which has those that left
	OMP_NUM_THREADS=1 $(LEGACY)/bin/python -m pytest -m "$(WHICH)" tests/architectures

bench: $(VENV)/.installed-peers  ## ours and the peer in one run; results go to benchmarks/results/
	$(VENV)/bin/python benchmarks/training.py
	$(VENV)/bin/python benchmarks/speed.py
	$(VENV)/bin/python benchmarks/processes.py
	$(VENV)/bin/python benchmarks/parts.py
	$(VENV)/bin/python benchmarks/prepare.py
	$(VENV)/bin/python benchmarks/read_blocks.py
	$(VENV)/bin/python benchmarks/checkpoint.py
	$(VENV)/bin/python benchmarks/trackers.py
	$(VENV)/bin/python benchmarks/startup.py

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or later: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing the pinned dependencies into $(VENV) (a minute or two) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[fast,dev,tensorboard,wandb,deepspeed,lora]"
	@touch $@

$(VENV)/.installed-peers: $(VENV)/.installed-dev
	$(PIP) --editable ".[fast,dev,tensorboard,wandb,deepspeed,lora,peers]"
	@touch $@

$(LEGACY)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or later: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(LEGACY)

$(LEGACY)/.installed: $(LEGACY)/bin/python pyproject.toml constraints-legacy.txt
	@echo "installing transformers 4.57 and all beside it into $(LEGACY) (two or three minutes) ..."
	$(PIP_LEGACY) --editable ".[fast,dev,tensorboard,wandb,deepspeed,lora,legacy]"
	$(PIP_LEGACY) --no-deps pytorch-quantization
	@touch $@

clean:  ## the environments only; runs and prepared data are yours
	rm -rf $(VENV) $(LEGACY)
