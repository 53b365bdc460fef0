# make serve | test | test-all | test-gpu | test-clients | test-page | test-ray | check | bench | setup | lock | licenses | docs | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
HOST   ?= 127.0.0.1
PORT   ?= 8000
WORKERS ?= 2
GPU_WORKERS ?= 4
GPU_KERNELS := tests/test_paged_triton.py tests/test_triton_layers.py tests/test_gpu_products.py tests/test_gpu_packed_models.py
AGENTS := tests/clients/agents
export HOST PORT

.PHONY: serve test test-all test-gpu test-clients test-page test-ray check bench setup setup-dev lock licenses docs clean

serve: setup
	@$(BIN)/python main.py

# What is marked slow is left to test-all
test: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: setup-dev
	$(BIN)/python -m pytest -n $(WORKERS) --hypothesis-profile thorough

# Parity is skipped without a GPU, and kernels run in the interpreter; scripts/gpu_check.sh runs these and the benchmarks
test-gpu: setup-dev
	$(BIN)/python -m pytest -n $(GPU_WORKERS) tests/gpu $(GPU_KERNELS) -rs

# The clients have environments of their own, and start the server in this one
test-clients: setup $(VENV)-clients/.installed $(VENV)-clients-legacy/.installed $(VENV)-clients-aider/.installed \
		tests/clients/node_modules/.installed $(AGENTS)/node_modules/.installed
	SERVER_PYTHON=$(abspath $(BIN))/python LEGACY_PYTHON=$(abspath $(VENV)-clients-legacy/bin)/python \
		AIDER_PYTHON=$(abspath $(VENV)-clients-aider/bin)/python $(VENV)-clients/bin/python -m pytest tests/clients

# The chat page in Chromium (apt-get install chromium, or CHROMIUM=path), by Node 20 or newer
test-page: setup tests/page/node_modules/.installed
	cd tests/page && SERVER_PYTHON=$(abspath $(BIN))/python npm test

# Two replicas of a tiny model on Ray Serve
test-ray: $(VENV)-ray/.installed
	$(VENV)-ray/bin/python -m pytest tests/ray

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup-dev
	$(BIN)/python -m bench.run

setup: $(VENV)/.installed

setup-dev: $(VENV)/.installed-dev

# Python 3.11 or newer; the mark is as new as the requirements it was made from
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Every file is checked against its hash; torch, whose builds differ, comes by its version and finds the rest there
$(VENV)/.installed: requirements.lock | $(VENV)/bin/python
	$(PIP) install --require-hashes --no-deps -r requirements.lock
	$(PIP) install $(shell grep '^torch==' requirements.txt)
	$(PIP) check
	@touch $@

# After a change of requirements.txt
lock: $(VENV)-uv/.installed
	UV=$(VENV)-uv/bin/uv scripts/lock.sh

licenses: setup
	$(BIN)/python scripts/licenses.py

# After a change of settings, requests, demo models or files: the parts of the documents that are made from the code
docs: setup
	$(BIN)/python scripts/docs.py

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) install -r requirements-dev.txt
	@touch $@

$(VENV)-%/.installed: requirements-%.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Clients written for Node, which has to be there
tests/clients/node_modules/.installed: tests/clients/package-lock.json
	cd tests/clients && npm ci --no-audit --no-fund
	@touch $@

# npm ci refuses a lock without the parts for other systems, which this one was made without
$(AGENTS)/node_modules/.installed: $(AGENTS)/package.json $(AGENTS)/package-lock.json
	cd $(AGENTS) && npm install --no-save --no-audit --no-fund --loglevel=error
	@touch $@

tests/page/node_modules/.installed: tests/page/package-lock.json
	cd tests/page && npm ci --no-audit --no-fund
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-* $(AGENTS)/node_modules tests/clients/node_modules tests/page/node_modules \
		.pytest_cache .mypy_cache .ruff_cache
