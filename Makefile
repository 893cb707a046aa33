PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: setup demo test check smoke docs

# One stamp per environment: it is made again when a pin changes.
$(VENV)/.ready: requirements.txt requirements.gpu.txt requirements.extra.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements.gpu.txt -r requirements.extra.txt
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(RUN) -m scripts.demo

test: setup
	$(RUN) -m scripts.get_demo_model
	$(RUN) -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: setup
	$(RUN) -m scripts.demo --smoke

docs: setup
	$(RUN) -m scripts.common.reference
