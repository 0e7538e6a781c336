# make demo   run the example task end to end          make test      lint, types and the fast tests
# make failures  plant five faults, see the gate catch them
# make setup  install what running needs into .venv    make test-all  every test, the slow ones and `make sanitize` too
#
# torch's default build for Linux brings CUDA libraries of several GB. For the CPU build:
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.PHONY: demo failures setup dev test test-all sanitize lint format bench clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/tunegate run examples/support/task.yaml

# Five spoilt runs and a sound one on the packaged base; fails unless each is caught for its reason.
failures: setup
	$(BIN)/python examples/failures/run.py

setup: $(VENV)/.runtime
dev: $(VENV)/.dev

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python >= 3.10, or name it: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version) is too old: tunegate needs Python >= 3.10. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

KERNELS := CMakeLists.txt $(wildcard src/tunegate/kernels/csrc/*)

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt $(KERNELS)
	$(PIP) -e .
	@touch $@

# Tests also run the AVX-512 and AMX kernels on machines without them, by emulation.
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt $(KERNELS)
	$(PIP) -e '.[dev]' --config-settings=cmake.define.TUNEGATE_EMULATION=ON
	@touch $(VENV)/.runtime $@

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint sanitize
	$(BIN)/python -m pytest

# The kernel tests on kernels with address and undefined-behaviour checks, in an environment beside .venv that takes
# everything else from it. Every level that this machine can run, the emulated ones too.
SANITIZED := build/sanitized
CHECKED := address,undefined

$(SANITIZED)/.built: $(VENV)/.dev
	@echo 'int main() { return 0; }' | $${CXX:-g++} -x c++ -fsanitize=$(CHECKED) -o /dev/null - || { \
	  echo "$${CXX:-g++} has no sanitizer libraries. On Debian and Ubuntu: apt install libasan8 libubsan1"; exit 1; }
	$(PYTHON) -m venv $(SANITIZED)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(SANITIZED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(SANITIZED)/bin/python -m pip install --disable-pip-version-check --no-deps --force-reinstall . \
	  --config-settings=cmake.define.TUNEGATE_EMULATION=ON --config-settings=cmake.define.TUNEGATE_SANITIZE=ON \
	  --config-settings=build-dir=build/sanitized-objects
	@touch $@

# A sanitizer writes to the file descriptor and ends the process: pytest must not hold it (--capture=sys). libstdc++ is
# loaded early, or an exception thrown through a kernel ends in the sanitizer instead of in Python.
sanitize: $(SANITIZED)/.built
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 TUNEGATE_SANITIZED=1 \
	  $(SANITIZED)/bin/python -m pytest -p no:cacheprovider --capture=sys -m "not slow" tests/kernels tests/test_kernels_attention.py tests/test_kernels_segments.py

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Speed and memory beside TRL and PEFT; results go to docs/benchmarks/.
bench: $(VENV)/.runtime
	$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/run_all.py

# Keeps examples/*/runs and the cache of bases: a finished run is not rubbish.
clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
