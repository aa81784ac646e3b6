# make train   installs into .venv and runs the default job on this machine's CPU
# make test    installs into .venv and runs the tests
# make test-vllm   installs into .venv, and vLLM for CPUs into .venv-vllm (3.5 GB), and runs its tests
# Also: install test-all lint types bench clean. Another torch: make install TORCH=torch==2.13.0
# FLOWRL_BUILD_NATIVE=0 make install: without csrc/; =1: fail where it cannot be built.

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
VENV_VLLM ?= .venv-vllm
BIN := $(VENV)/bin
BIN_VLLM := $(VENV_VLLM)/bin
RUN := runs/countdown_cpu
PIP := $(BIN)/pip install --disable-pip-version-check -q
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: install train test test-all test-vllm lint types bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/include/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "flowrl needs Python 3.11 or newer; make install PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25" "setuptools>=77" wheel
	-$(PIP) -c constraints.txt cmake ninja numpy  # for the native operators, which are optional
	-if command -v nvcc >/dev/null; then $(PIP) --no-deps -c constraints.txt nvidia-cutlass; fi
ifeq ($(TORCH),)
	$(PIP) -c constraints.txt "torch==2.13.0+cpu" 2>/dev/null \
	  || $(PIP) --retries 0 --timeout 20 --index-url $(TORCH_CPU_INDEX) "torch==2.13.0" 2>/dev/null \
	  || $(PIP) -c constraints.txt "torch==2.13.0"
else
	$(PIP) "$(TORCH)"
endif
	# No warnings: of nvidia-cutlass only the headers are used, without what it requires.
	$(PIP) -c constraints.txt --no-build-isolation --no-warn-conflicts -e ".[dev]"
	@touch $@

# Trains once; a run that was cut short goes on from its newest checkpoint.
train: install $(RUN)/report.html
	@echo "trained: open $(RUN)/report.html; train again with: $(BIN)/flowrl train --run.dir runs/again"

$(RUN)/report.html: | install
	$(BIN)/flowrl train $(if $(wildcard $(RUN)/config.toml),--resume)

test: install
	$(BIN)/python -m pytest

# The tests run in .venv-vllm; where they train with Megatron the trainer runs in .venv.
test-vllm: install $(VENV_VLLM)/.installed
	FLOWRL_TRAINER_PYTHON=$(abspath $(BIN)/python) $(BIN_VLLM)/python -m pytest tests/with_vllm

# vLLM takes torchvision, torchaudio and torchcodec with it; their builds do not fit a CPU torch, and
# then transformers cannot be imported. The checkout is found by a .pth file: a second editable
# install would build csrc/ again, into the same place.
$(VENV_VLLM)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(BIN_VLLM)/pip install -q --upgrade "pip>=25" "setuptools>=77" wheel
	$(BIN_VLLM)/pip install -q "torch==2.13.0+cpu" 2>/dev/null \
	  || $(BIN_VLLM)/pip install -q --index-url $(TORCH_CPU_INDEX) "torch==2.13.0"
	$(BIN_VLLM)/pip install -q -r constraints-vllm.txt
	$(BIN_VLLM)/pip uninstall -q -y torchvision torchaudio torchcodec
	printf '%s\n' "$(CURDIR)" "$(CURDIR)/kernels" \
	  > "$$($(BIN_VLLM)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/flowrl_checkout.pth"
	@touch $@

# Every layout of every family on two and four processes, other layouts on resume, two agents.
test-all: test
	$(BIN)/python -m pytest -m matrix

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

bench: install
	$(BIN)/python -m bench linear_logprobs

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
