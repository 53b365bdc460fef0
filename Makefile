# make serve | test | test-clients | check | bench | setup | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
HOST   ?= 127.0.0.1
PORT   ?= 8000
export HOST PORT

.PHONY: serve test test-clients check bench setup setup-dev clean

serve: setup
	@$(BIN)/python main.py

test: setup-dev
	$(BIN)/python -m pytest

# The clients have environments of their own, and start the server in this one
test-clients: setup $(VENV)-clients/.installed $(VENV)-clients-legacy/.installed
	SERVER_PYTHON=$(abspath $(BIN))/python LEGACY_PYTHON=$(abspath $(VENV)-clients-legacy/bin)/python \
		$(VENV)-clients/bin/python -m pytest tests/clients

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

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)-%/.installed: requirements-%.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-clients-legacy .pytest_cache .mypy_cache .ruff_cache
