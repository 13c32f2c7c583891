# Targets install into .venv only when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/python

.PHONY: help install demo test quick check docs bench results real clean install-vllm test-vllm test-trl release

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[deepspeed,plots,ray,remote,math,serve,real,docs,dev]'
	touch $@

demo: $(STAMP) ## build the demo world, train, export, evaluate, write the report
	$(RUN) -m scripts.demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## run all tests, two files at a time
	$(PYTEST)

quick: $(STAMP) ## run the tests that start no process, train nothing and take under two seconds
	$(PYTEST) -m "not slow"

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_TORCH := $(shell grep '^torch==' constraints-vllm.txt)

install-vllm: $(VLLM_STAMP) ## make .venv-vllm: vLLM for CPU hosts with the versions that it wants

# torch's CPU build comes first. PyPI has the CUDA one alone: where pip does not look further, PIP_EXTRA_INDEX_URL names
# PyTorch's own index of CPU builds.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps '$(VLLM_TORCH)' || \
	  { echo "pip finds no $(VLLM_TORCH): set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds" >&2; exit 1; }
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

VLLM_PYTEST := OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest
VLLM_TESTS := $(shell grep -rlE 'mark\.vllm' tests --include='test_*.py')
ALSO_THERE := $(addprefix tests/,iama/models iama/rewards/test_rewards.py iama/rewards/test_pairs.py inference/engine inference/samplers)

test-vllm: $(VLLM_STAMP) ## run the tests that need vLLM, then quick ones of models and rewards on its transformers
	$(VLLM_PYTEST) -m vllm $(VLLM_TESTS)
	$(VLLM_PYTEST) -m "not vllm and not slow" --numprocesses 2 --dist loadfile $(ALSO_THERE)

# Both ends of the range in pyproject.toml. What TRL decides with it (transformers, peft, ...) is the newest that fits.
TRL ?= oldest
TRL_VENV := .venv-trl-$(TRL)
TRL_RANGE := $(shell sed -nE 's/^ *"trl(>=[^"]*)",/\1/p' pyproject.toml)
TRL_WANTED = $(if $(filter oldest,$(TRL)),$(subst >=,==,$(firstword $(subst $(COMMA), ,$(TRL_RANGE)))),$(TRL_RANGE))
COMMA := ,
FREE := trl|transformers|accelerate|peft|datasets|huggingface_hub|tokenizers|safetensors|hf-xet|fsspec|pyarrow

test-trl: ## quick tests of training on the oldest TRL of the range, or with TRL=newest on the newest
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	grep -vE '^($(FREE))==' constraints.txt > $(TRL_VENV)/constraints.txt
	$(TRL_VENV)/bin/python -m pip install --quiet -c $(TRL_VENV)/constraints.txt -e '.[deepspeed,dev]' 'trl$(TRL_WANTED)'
	$(TRL_VENV)/bin/python -m pip list 2>/dev/null | grep -E '^(trl|transformers|peft|accelerate) '
	OMP_NUM_THREADS=1 $(TRL_VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" tests/trainers tests/iama/objective

RELEASE_VENV := build/release

release: $(STAMP) ## build the archives into dist/, check them, and try the wheel in an environment of its own
	rm -rf dist $(RELEASE_VENV)
	$(RUN) -m build --outdir dist .
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet twine
	$(RELEASE_VENV)/bin/python -m twine check --strict dist/*
	$(RELEASE_VENV)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd $(RELEASE_VENV) && bin/iama --help > /dev/null && bin/iama doctor && bin/iama recipes && bin/iama selftest
	@ls -l dist

check: $(STAMP) ## ruff, ruff format, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

docs: $(STAMP) ## build the documentation into runs/site, with every link checked
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict -f configs/mkdocs.yml

bench: $(STAMP) ## speed of sampling, of CARDS and of the objective, as ratios
	$(RUN) -m scripts.bench
	$(RUN) -m scripts.bench.engines

EXPERIMENTS := toy estimator_study direction search front guided_study reasoning savings before_training maxrl

results: $(STAMP) ## regenerate docs/results/demo.md and the pages of scripts/experiments (hours on two cores; resumable)
	$(RUN) -m scripts.results
	set -e; for name in $(EXPERIMENTS); do $(RUN) -m scripts.experiments.$$name; done
	$(RUN) -m scripts.experiments.redraw
	$(RUN) -m scripts.experiments.index

SCALE ?= small

real: $(STAMP) ## what IAMA saves on SmolLM2-135M-Instruct (45 minutes on two idle cores; SCALE=full: hours; resumable)
	$(RUN) -m scripts.real.study --scale $(SCALE)

clean: ## remove runs, caches and .venv
	rm -rf runs $(VENV) $(VLLM_VENV) .venv-trl-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
