# Everything runs in .venv, which the first command makes. PYTHON chooses the interpreter (3.10 or newer).
# PIP_FLAGS goes to pip, for example: make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: quickstart test test-slow test-gpu test-deepspeed fuzz mutate cases verify-gguf bench bench-merge gpu gpu-bundle docs dist notebooks lint format clean

quickstart: .venv/installed
	$(BIN)/tuna-peft run recipes/quickstart.yaml --output runs/quickstart

# A process for each core (every test uses one thread); the tests of a file stay in one process, which keeps its models.
test: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

# Tests that need a GPU; all others hide it, because only a CPU repeats a training to the same bytes.
test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu

# Two processes under DeepSpeed; where there is a C++ compiler, DeepSpeed builds a part of itself first (a minute).
test-deepspeed: .venv/installed-dev
	$(PIP_INSTALL) -e ".[dev,deepspeed]"
	$(BIN)/python -m pytest -m slow tests/run/test_processes.py -k "deepspeed or zero2"

# 2,000 damaged and hostile recipes, data files, stacks, journals and options; a few minutes. Fails for a traceback, a
# hang, or an input that is accepted for no listed reason.
fuzz: .venv/installed-dev
	$(BIN)/python -m benchmarks.fuzz --count 2000 --seed 0

# Plants small bugs one at a time (6 to 40 s each) and counts those that the tests notice. Results are kept in build/,
# so that only what has changed runs again. Fails below 95 %.
mutate: .venv/installed-dev
	nice -n 10 $(BIN)/python -m benchmarks.mutants

# Inputs that once failed, each a folder with its command and what should happen: make cases DIR=../cases
cases: .venv/installed-dev
	$(BIN)/python -m benchmarks.cases $(DIR)

# llama.cpp itself on GGUF files, beside transformers and PEFT, the commands of model cards, and llama.cpp's server (a
# wheel of 100 MB); needs Node.js 20. Prints the table of docs/gguf.md.
verify-gguf: .venv/installed-dev
	npm install --silent --no-save --ignore-scripts --prefix build/llama-cpp node-llama-cpp@3.22.1
	$(BIN)/python -m pytest -q -m slow tests/export/gguf/test_llama_cpp.py
	$(BIN)/python -m pytest -q -m slow tests/export/test_hub.py
	$(PIP_INSTALL) xllamacpp
	$(BIN)/python -m pytest -q -m slow tests/run/test_llama_cpp_server.py

# Minutes on meta tensors, about twenty on the CPU; nothing else should run meanwhile.
BENCH := $(BIN)/python -m benchmarks.ranking_step --json benchmarks/results/local.json
bench: .venv/installed-dev
	for w in short long short-varied long-varied; do $(BENCH) --device meta --workload $$w --groups 2 || exit 1; done
	for s in 8b 13b; do $(BENCH) --device meta --shape $$s --workload long || exit 1; done
	for w in short-varied long-varied; do $(BENCH) --device cpu --workload $$w --groups 2 || exit 1; done
	$(BENCH) --device cpu --workload long-varied --groups 2 --groups-per-batch 2 --arms reference trl-cpo ours
	$(BIN)/python -m benchmarks.report benchmarks/results/local.json

# Writes 27 GB here and deletes them again; add --arms copy merge merge-original peft where 16 GB of memory are free.
bench-merge: .venv/installed-dev
	$(BIN)/python -m benchmarks.merge --shape 7b --json benchmarks/results/merge-local.json

# Ten minutes on a GPU, most important first; results in build/gpu/gpu.json after every arm. Run again for what is missing.
gpu: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu --out build/gpu
	$(BIN)/python -m benchmarks.report build/gpu/gpu.json

# What a machine with PyTorch needs for it without a network, in one file: see docs/performance.md. Fails above 64 MiB.
gpu-bundle: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu.bundle build/gpu-bundle.tar

# The site, into build/site (Python 3.11 or newer); a broken link or an unknown name is an error. Generated pages and
# figures are files of the repository: docs/make_pages.py, docs/figures/make.py and `tuna-peft schema --markdown` write them.
docs: .venv/installed-docs
	$(BIN)/zensical build --strict

# Wheel and source archive, in dist/. Then what a user of the wheel gets: a new environment, an empty home, the quickstart.
RELEASE := build/release
dist:
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet $(PIP_FLAGS) build==1.6.1 twine==7.0.0
	$(RELEASE)/tools/bin/python -m build
	$(RELEASE)/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)/user
	$(RELEASE)/user/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt dist/*.whl
	cd $(RELEASE) && env -u PYTHONPATH HOME=$$PWD/home HF_HUB_OFFLINE=1 user/bin/tuna-peft run quickstart --output run

# All notebooks, top to bottom, on pico-LLaMA.
notebooks: .venv/installed-dev
	$(BIN)/python -m pytest tests/notebooks

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist

$(BIN)/python:
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv, without a word until it is done; torch with CUDA is several gigabytes."

# Stamps: the installation is repeated only when what it depends on has changed.
.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[gguf]"
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	touch $@ .venv/installed

.venv/installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[docs]"
	touch $@ .venv/installed
